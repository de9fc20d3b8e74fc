"""`token` and `ca`: access tokens of this machine's gateway, and the CA of its exposed ports."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import formatting, options, output
from agent.cli.errors import CliError

if TYPE_CHECKING:
    from agent.common.tokens import Token, TokenFile


def _token_file() -> TokenFile:
    from agent.common.config.loading import load
    from agent.common.tokens import TokenFile

    return TokenFile(load().gateway.tokens_file)


def _to_json(token: Token) -> dict[str, object]:
    return {
        "id": token.id, "org": token.org, "note": token.note, "regions": token.regions,
        "maxSandboxes": token.max_sandboxes, "maxMemoryBytes": token.max_memory_bytes,
        "maxLifetimeSeconds": token.max_lifetime_s, "createTime": token.create_time,
    }  # fmt: skip


async def create(
    org: Annotated[str, typer.Option(metavar="NAME", help="Organization whose sandboxes the token gives access to.")],
    note: Annotated[str, typer.Option(metavar="TEXT", help="Note for `token ls`.")] = "",
    region: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Allow creates in this region; repeatable. Default: all regions."),
    ] = None,
    max_sandboxes: Annotated[
        int, typer.Option(metavar="N", min=0, help="Maximum number of sandboxes at a time; 0: no limit.")
    ] = 0,
    max_memory: Annotated[str, typer.Option(metavar="SIZE", help="Maximum memory of each sandbox, such as 2GiB.")] = "",
    max_lifetime: Annotated[
        str, typer.Option(metavar="TIME", help="Maximum lifetime of each sandbox, such as 30m.")
    ] = "",
) -> None:
    """Create an access token for the gateway and print it.

    It cannot be shown again.
    """
    if not org.strip() or len(org) > 64:
        raise CliError("--org must have 1 to 64 characters", reason="INVALID_ORG", status=2)
    token, secret = _token_file().create(
        org,
        note=note,
        regions=region or [],
        max_sandboxes=max_sandboxes,
        max_memory_bytes=options.parse_size(max_memory) if max_memory else 0,
        max_lifetime_s=int(options.parse_duration(max_lifetime)) if max_lifetime else 0,
    )
    output.print_result({**_to_json(token), "token": secret}, secret)


async def ls() -> None:
    """List the tokens without their secret part."""
    tokens = _token_file().tokens()
    if output.json_enabled():
        for token in tokens:
            output.print_json(_to_json(token))
        return
    headers = ("ID", "ORG", "AGE", "REGIONS", "SANDBOXES", "MEMORY", "LIFETIME", "NOTE")
    output.print_table(headers, [_row(token) for token in tokens])


def _row(token: Token) -> tuple[str, ...]:
    return (
        token.id, token.org, formatting.duration(time.time() - token.create_time), ",".join(token.regions) or "all",
        str(token.max_sandboxes or "-"), formatting.size(token.max_memory_bytes) if token.max_memory_bytes else "-",
        f"{token.max_lifetime_s} s" if token.max_lifetime_s else "-", formatting.printable(token.note),
    )  # fmt: skip


async def revoke(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="Token id, as `token ls` prints it.")],
) -> None:
    """Revoke a token.

    The gateway rejects it for new connections; open ones stay.
    """
    _token_file().revoke(token_id)
    if output.json_enabled():
        output.print_json({"revoked": token_id})


async def create_ca() -> None:
    """Create the CA for the gateway's exposed ports.

    Print the path of its certificate, which clients must trust.
    """
    from agent.common.ca import LocalCa, write_ca
    from agent.common.config.loading import load

    settings = load().gateway
    try:
        path = write_ca(settings.state_dir, LocalCa.generate(f"*.{settings.domain}"))
    except FileExistsError as error:
        raise CliError(f"{error.filename} exists; remove it to create another CA", reason="CA_EXISTS") from None
    except OSError as error:
        raise CliError(f"cannot write {error.filename}: {error.strerror}", reason="CA_NOT_WRITTEN") from error
    output.print_result({"certificateFile": str(path)}, str(path))
