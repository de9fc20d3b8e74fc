"""`cp`: copies files and directories into a sandbox and out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import output
from agent.cli.connect import connected
from agent.cli.errors import print_warning
from agent.common.api_client import Api
from agent.common.model import is_sandbox_id

if TYPE_CHECKING:
    from agent.cli.transfer.progress import Transfer


@dataclass(frozen=True, slots=True)
class Location:
    """Source or target of a copy; `sandbox_id` is "" for this machine."""

    sandbox_id: str
    path: str

    @classmethod
    def parse(cls, word: str) -> Location:
        """Parse SRC or DST: ID:PATH is in a sandbox, any other text is a path on this machine."""
        sandbox_id, separator, path = word.partition(":")
        return cls(sandbox_id, path) if separator and is_sandbox_id(sandbox_id) else cls("", word)


async def cp(
    source: Annotated[str, typer.Argument(metavar="SRC", help="ID:PATH, a local path, or - for standard input.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="ID:PATH, a local path, or - for standard output.")],
    follow_link: Annotated[
        bool, typer.Option("--follow-link", "-L", help="If SRC is a symbolic link, copy its target.")
    ] = False,
) -> int:
    """Copy files between this machine and a sandbox.

    Directories are copied with their content. If DST is a directory, copy into it, as cp does; "SRC/." copies only the
    content of SRC. Keep modes, times and symbolic links. Files belong to root in the sandbox, and to the current user
    on this machine. Skip devices, sockets and pipes, and then exit with 1. Set-user-ID bits never leave a sandbox.
    """
    from agent.cli.transfer.progress import Transfer

    here, there = Location.parse(source), Location.parse(target)
    if bool(here.sandbox_id) == bool(there.sandbox_id):
        raise typer.BadParameter("one of SRC and DST must be ID:PATH, the other a path on this machine")
    if output.json_enabled() and target == "-":
        raise typer.BadParameter("--json and a copy to standard output exclude each other")
    follow = follow_link or source.endswith("/")
    transfer = Transfer()
    async with connected() as api:
        with transfer:
            await _copy(api, transfer, here, there, follow=follow)
    for path in transfer.skipped:
        print_warning(f"skipped {path}: it is not a file, directory or symbolic link")
    if output.json_enabled():
        output.print_json(
            {
                "files": transfer.files,
                "folders": transfer.directories,
                "links": transfer.links,
                "bytes": transfer.bytes,
                "left_out": transfer.skipped,
            }
        )
    return 1 if transfer.skipped else 0


async def _copy(api: Api, transfer: Transfer, source: Location, target: Location, *, follow: bool) -> None:
    from agent.cli.transfer.entry import guest_path
    from agent.cli.transfer.guest_files import GuestFiles

    if source.sandbox_id:
        from agent.cli.transfer.download import download

        files = GuestFiles(api, source.sandbox_id)
        await download(files, transfer, guest_path(source.path), target.path, follow=follow)
    else:
        from agent.cli.transfer.upload import upload

        await upload(GuestFiles(api, target.sandbox_id), transfer, source.path, target.path, follow=follow)
