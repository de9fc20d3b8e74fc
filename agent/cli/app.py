"""`sandboxctl`: the commands and the options before them. Nothing slow is imported here: `--help` must be quick."""

from __future__ import annotations

from typing import Annotated

import typer

from agent.cli import options
from agent.cli.commands import (
    copy,
    doctor,
    events,
    execute,
    image,
    logs,
    node,
    pause,
    port_forward,
    process,
    report,
    sandbox,
    template,
    token,
    top,
    vmm,
)
from agent.cli.options import add_command

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
app = typer.Typer(
    name="sandboxctl", no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    pretty_exceptions_enable=False, context_settings=_SETTINGS,
)  # fmt: skip
images = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Images that sandboxes boot.")
vmms = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What runs virtual machines on this host.")
templates = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Frozen VMs that sandboxes start from.")
tokens = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Who may use this machine's gateway.")
authorities = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Who signs for exposed ports.")


@app.callback()
def _root(
    address: Annotated[
        str,
        typer.Option(
            envvar="SANDBOXD_ADDRESS", metavar="ADDRESS", help="unix:PATH or HOST:PORT; default: the settings' socket."
        ),
    ] = "",
    tls_ca: Annotated[str, typer.Option(metavar="FILE", help="Whom to trust, for HOST:PORT.")] = "",
    tls_cert: Annotated[str, typer.Option(metavar="FILE", help="Our certificate.")] = "",
    tls_key: Annotated[str, typer.Option(metavar="FILE", help="Its key.")] = "",
    insecure: Annotated[bool, typer.Option("--insecure", help="TCP without TLS; loopback alone.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only; also after the command.")] = False,
) -> None:
    """Create, use and watch microVM sandboxes of a sandboxd node."""
    options.begin(options.Options(address, tls_ca, tls_cert, tls_key, insecure, json))


add_command(app, sandbox.create)
add_command(app, sandbox.ls)
add_command(app, sandbox.inspect)
# What follows the id is the program's, options included.
add_command(app, execute.exec_, "exec", context_settings={"allow_interspersed_args": False})
add_command(app, process.ps)
add_command(app, execute.attach)
add_command(app, process.kill)
add_command(app, process.wait)
add_command(app, copy.cp)
add_command(app, logs.logs)
add_command(app, events.events)
add_command(app, port_forward.port_forward, "port-forward")
add_command(app, sandbox.rm)
add_command(app, sandbox.update)
add_command(app, pause.pause)
add_command(app, pause.resume)
add_command(app, pause.fork)
add_command(app, top.top)
add_command(app, node.node)
add_command(app, node.drain)
add_command(app, node.undrain)
add_command(images, image.ls)
add_command(images, image.build)
add_command(images, image.inspect)
add_command(images, image.rm)
app.add_typer(images, name="image")
add_command(templates, template.ls)
add_command(templates, template.prepare)
add_command(templates, template.rm)
app.add_typer(templates, name="template")
add_command(vmms, vmm.install)
app.add_typer(vmms, name="vmm")
add_command(tokens, token.create)
add_command(tokens, token.ls)
add_command(tokens, token.revoke)
app.add_typer(tokens, name="token")
add_command(authorities, token.create_ca, "create")
app.add_typer(authorities, name="ca")
add_command(app, doctor.doctor)
add_command(app, report.report)
add_command(app, node.version)


def main() -> None:
    """Entry point of `sandboxctl`."""
    app(prog_name="sandboxctl")


if __name__ == "__main__":
    main()
