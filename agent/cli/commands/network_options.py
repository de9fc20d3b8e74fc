"""Options for network policy and secrets that `create` and `update` share, and their lines in `inspect`."""

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
    typer.Option(
        metavar="RULE",
        help="Allow a host, *.domain, address or range, optionally with :PORT, and deny the rest; repeatable.",
    ),
]
NoNetwork = Annotated[bool, typer.Option("--no-network", help="Deny all network access.")]
Inspect = Annotated[
    bool, typer.Option("--inspect", help="Decrypt TLS to allowed hosts and check the host name in the requests.")
]
Secrets = Annotated[
    list[str] | None,
    typer.Option(
        "--secret", metavar="NAME=HOST[,HOST...]",
        help="Put the secret NAME into requests to these hosts only. Its value is that of this command's environment "
        "variable NAME. Append +in-body, +keep-shape or +allow-reflection. Repeatable.",
    ),
]  # fmt: skip
_FLAGS = {"in-body": "in_body", "keep-shape": "keep_shape", "allow-reflection": "allow_reflection"}


def policy(
    allow: Iterable[str] | None, *, nothing: bool, inspect: bool, everything: bool = False
) -> NetworkPolicy | None:
    """Return the policy for --allow, --no-network, --inspect and --open-network, or None if none of them is given.

    :raises typer.BadParameter: two of --allow, --no-network and --open-network are given.
    """
    from sandboxd.v1 import sandbox_pb2

    rules = list(allow or ())
    if bool(rules) + nothing + everything > 1:
        raise typer.BadParameter("give only one of --allow, --no-network and --open-network")
    if not (rules or nothing or everything or inspect):
        return None
    message = sandbox_pb2.NetworkPolicy(inspect=inspect)
    if rules or nothing:
        message.allow.rules.extend(rules)
        message.allow.SetInParent()
    return message


def secrets(texts: Iterable[str] | None) -> dict[str, Secret]:
    """Return the secrets for the texts given to --secret; values come from the environment.

    :raises typer.BadParameter: a text is not of the form NAME=HOST[,HOST...][+FLAG...].
    :raises CliError: the environment variable NAME is empty or not set.
    """
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
                f"--secret {name}: set the environment variable {name} to the value of the secret",
                reason="NO_SECRET_VALUE", status=2,
            )  # fmt: skip
        chosen = {_FLAGS[flag]: True for flag in flags}
        found[name] = sandbox_pb2.Secret(value=value, hosts=hosts.split(","), **chosen)
    return found


def facts(sandbox: Sandbox) -> list[tuple[str, str]]:
    """Return the (name, value) lines of `inspect` for policy, secrets, denials and tenant."""
    net = sandbox.network
    access = "open"
    if net.HasField("allow"):
        access = ", ".join(net.allow.rules) or "nothing"
    lines = [("network", access + (", inspected" if net.inspect else ""))]
    lines += [
        (f"  {name}", f"{secret.placeholder} for {', '.join(secret.hosts)}")
        for name, secret in sorted(sandbox.secrets.items())
    ]
    lines += [(f"  {reason}", f"denied {count} times") for reason, count in sorted(sandbox.denials.items())]
    if sandbox.tenant:
        lines.append(("tenant", sandbox.tenant))
    return lines
