"""`token` and `ca`: who may use the gateway of this machine, and the certificate authority of its exposed ports."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import output, text
from agent.cli.errors import CliError

if TYPE_CHECKING:
    from agent.common.tokens import Token, TokenFile

_Id = Annotated[str, typer.Argument(metavar="ID")]


def _file() -> TokenFile:
    from agent.common.config.loading import load
    from agent.common.tokens import TokenFile

    return TokenFile(load().gateway.tokens_file)


def _facts(token: Token) -> dict[str, object]:
    return {
        "id": token.id, "org": token.org, "note": token.note, "regions": token.regions,
        "maxSandboxes": token.max_sandboxes, "maxMemoryBytes": token.max_memory_bytes,
        "maxLifetimeSeconds": token.max_lifetime_s, "createTime": token.create_time,
    }  # fmt: skip


async def create(
    org: Annotated[str, typer.Option(metavar="NAME", help="Whose sandboxes it is about; nobody else sees them.")],
    note: Annotated[str, typer.Option(metavar="TEXT", help="What it is for.")] = "",
    region: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="May create there; repeat. Default: all.")
    ] = None,
    max_sandboxes: Annotated[int, typer.Option(metavar="N", min=0, help="At most so many at a time; 0: no limit.")] = 0,
    max_memory: Annotated[str, typer.Option(metavar="SIZE", help="At most so much memory each, such as 2GiB.")] = "",
    max_lifetime: Annotated[str, typer.Option(metavar="TIME", help="At most so long each, such as 30m.")] = "",
) -> None:
    """Make a token for the gateway, and print it: it is shown this once."""
    if not org.strip() or len(org) > 64:
        raise CliError("--org must have 1 to 64 characters", reason="INVALID_ORG", status=2)
    token, secret = _file().create(
        org,
        note=note,
        regions=region or [],
        max_sandboxes=max_sandboxes,
        max_memory_bytes=text.size_option(max_memory) if max_memory else 0,
        max_lifetime_s=int(text.duration_option(max_lifetime)) if max_lifetime else 0,
    )
    if output.json_wanted():
        output.emit({**_facts(token), "token": secret})
    else:
        output.say(secret)


async def ls() -> None:
    """List the tokens, without their texts."""
    tokens = _file().tokens()
    if output.json_wanted():
        for token in tokens:
            output.emit(_facts(token))
        return
    rows = [
        (
            token.id, token.org, text.age(time.time() - token.create_time), ",".join(token.regions) or "all",
            str(token.max_sandboxes or "-"), text.size(token.max_memory_bytes) if token.max_memory_bytes else "-",
            f"{token.max_lifetime_s} s" if token.max_lifetime_s else "-", text.printable(token.note),
        )
        for token in tokens
    ]  # fmt: skip
    output.print_table(("ID", "ORG", "AGE", "REGIONS", "SANDBOXES", "MEMORY", "LIFETIME", "NOTE"), rows)


async def revoke(token_id: _Id) -> None:
    """Remove a token: it opens nothing any more; connections that it opened stay."""
    _file().revoke(token_id)
    if output.json_wanted():
        output.emit({"revoked": token_id})


async def create_ca() -> None:
    """Make the CA for the gateway's exposed ports, and print its certificate's file, for clients to trust."""
    from agent.common.ca import LocalCa, write_ca
    from agent.common.config.loading import load

    settings = load().gateway
    try:
        path = write_ca(settings.state_dir, LocalCa.generate(f"*.{settings.domain}"))
    except FileExistsError as error:
        raise CliError(
            f"{error.filename} exists; remove it first if another CA is wanted", reason="CA_EXISTS"
        ) from None
    except OSError as error:
        raise CliError(f"cannot write {error.filename}: {error.strerror}", reason="CA_NOT_WRITTEN") from error
    if output.json_wanted():
        output.emit({"certificateFile": str(path)})
    else:
        output.say(str(path))
