"""`sandboxctl`: the table of all commands, and the global options before them.

Modules of commands import gRPC, asyncio and rich inside functions, so that `--help` starts quickly.
"""

from __future__ import annotations

from typing import Annotated

import typer

from agent.cli import options
from agent.cli.commands import (
    copy,
    create,
    doctor,
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
from agent.cli.runner import add_command

app = typer.Typer(
    name="sandboxctl", no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)  # fmt: skip


@app.callback()
def _root(
    address: Annotated[
        str,
        typer.Option(
            envvar="SANDBOXD_ADDRESS", metavar="ADDRESS",
            help="Daemon address: unix:PATH or HOST:PORT. Default: the unix socket of the settings.",
        ),
    ] = "",
    tls_ca: Annotated[
        str, typer.Option(metavar="FILE", help="CA certificate that signs the daemon's certificate, for HOST:PORT.")
    ] = "",
    tls_cert: Annotated[str, typer.Option(metavar="FILE", help="Client certificate, for HOST:PORT.")] = "",
    tls_key: Annotated[str, typer.Option(metavar="FILE", help="Private key of the client certificate.")] = "",
    insecure: Annotated[bool, typer.Option("--insecure", help="Use TCP without TLS; loopback addresses only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only; also accepted after the command.")] = False,
) -> None:  # fmt: skip
    """Create, use and monitor the microVM sandboxes of a sandboxd node."""
    options.set_current(options.Options(address, tls_ca, tls_cert, tls_key, insecure, json))


def _add_group(name: str, help_text: str) -> typer.Typer:
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=help_text)
    app.add_typer(group, name=name)
    return group


add_command(app, create.create)
add_command(app, sandbox.ls)
add_command(app, sandbox.inspect)
# All words after the sandbox's id belong to the program, options included.
add_command(app, process.exec_, "exec", context_settings={"allow_interspersed_args": False})
add_command(app, process.ps)
add_command(app, process.attach)
add_command(app, process.kill)
add_command(app, process.wait)
add_command(app, copy.cp)
add_command(app, logs.logs)
add_command(app, logs.events)
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

images = _add_group("image", "Manage images that sandboxes boot.")
add_command(images, image.ls)
add_command(images, image.build)
add_command(images, image.inspect)
add_command(images, image.rm)

templates = _add_group("template", "Manage templates: suspended VMs that sandboxes start from.")
add_command(templates, template.ls)
add_command(templates, template.prepare)
add_command(templates, template.rm)

add_command(_add_group("vmm", "Manage virtual machine monitors (VMMs) of this host."), vmm.install)

tokens = _add_group("token", "Manage access tokens of this machine's gateway.")
add_command(tokens, token.create)
add_command(tokens, token.ls)
add_command(tokens, token.revoke)

add_command(_add_group("ca", "Manage the certificate authority (CA) of exposed ports."), token.create_ca, "create")

add_command(app, doctor.doctor)
add_command(app, report.report)
add_command(app, node.version)


def main() -> None:
    """Run `sandboxctl` and exit with its status."""
    app(prog_name="sandboxctl")


if __name__ == "__main__":
    main()
