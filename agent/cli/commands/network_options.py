"""What `create` and `update` say of a sandbox's network and secrets."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli.errors import CliError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandboxd.v1.sandbox_pb2 import NetworkPolicy, Sandbox, Secret

Allow = Annotated[
    list[str] | None,
    typer.Option(metavar="RULE", help="Host, *.domain, address or range, with :PORT; repeatable. Nothing else then."),
]
NoNetwork = Annotated[bool, typer.Option("--no-network", help="Nothing may be reached.")]
Inspect = Annotated[bool, typer.Option("--inspect", help="Open all TLS to allowed names, and check the host inside.")]
Secrets = Annotated[
    list[str] | None,
    typer.Option(
        "--secret", metavar="NAME=HOST[,HOST...]",
        help="The value is this command's own environment variable NAME and goes to these hosts alone. "
        "Append +in-body, +keep-shape or +allow-reflection. Repeatable.",
    ),
]  # fmt: skip
_FLAGS = {"in-body": "in_body", "keep-shape": "keep_shape", "allow-reflection": "allow_reflection"}


def policy(
    allow: Iterable[str] | None, *, nothing: bool, inspect: bool, everything: bool = False
) -> NetworkPolicy | None:
    """Returns the policy that the options ask for; None if they say nothing. :raises typer.BadParameter:"""
    from sandboxd.v1 import sandbox_pb2

    rules = list(allow or ())
    if bool(rules) + nothing + everything > 1:
        raise typer.BadParameter("give one of --allow, --no-network and --open-network")
    if not (rules or nothing or everything or inspect):
        return None
    message = sandbox_pb2.NetworkPolicy(inspect=inspect)
    if rules or nothing:
        message.allow.rules.extend(rules)
        message.allow.SetInParent()
    return message


def secrets(texts: Iterable[str] | None) -> dict[str, Secret]:
    """Returns the secrets that the options ask for. :raises typer.BadParameter: :raises CliError: no value."""
    from sandboxd.v1 import sandbox_pb2

    found = {}
    for text in texts or ():
        name, separator, rest = text.partition("=")
        hosts, *flags = rest.split("+")
        if not separator or not name or not hosts:
            raise typer.BadParameter(f"--secret {text}: write NAME=HOST[,HOST...]")
        unknown = [flag for flag in flags if flag not in _FLAGS]
        if unknown:
            raise typer.BadParameter(f"--secret {text}: +{unknown[0]} is not one of +{', +'.join(_FLAGS)}")
        value = os.environ.get(name)
        if not value:
            raise CliError(
                f"--secret {name}: the environment variable {name} is not set; its value is the secret",
                reason="NO_SECRET_VALUE", status=2,
            )  # fmt: skip
        chosen = {_FLAGS[flag]: True for flag in flags}
        found[name] = sandbox_pb2.Secret(value=value, hosts=hosts.split(","), **chosen)
    return found


def facts(sandbox: Sandbox) -> list[tuple[str, str]]:
    """Returns lines for `inspect`."""
    net = sandbox.network
    said = "open"
    if net.HasField("allow"):
        said = ", ".join(net.allow.rules) or "nothing"
    lines = [("network", said + (", inspected" if net.inspect else ""))]
    lines += [
        (f"  {name}", f"{secret.placeholder} for {', '.join(secret.hosts)}")
        for name, secret in sorted(sandbox.secrets.items())
    ]
    lines += [(f"  {reason}", f"denied {count} times") for reason, count in sorted(sandbox.denials.items())]
    if sandbox.tenant:
        lines.append(("tenant", sandbox.tenant))
    return lines
