"""`cp`: files and folders into a sandbox and out of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import output
from agent.cli.connect import connected
from agent.cli.errors import warn
from agent.common.api_client import Api
from agent.common.model import is_sandbox_id

if TYPE_CHECKING:
    from agent.cli.transfer.progress import Transfer


@dataclass(frozen=True, slots=True)
class Place:
    """One side of a copy: `sandbox_id` is empty for this machine."""

    sandbox_id: str
    path: str

    @classmethod
    def of(cls, word: str) -> Place:
        """Returns what SRC or DST means: ID:PATH is in a sandbox, all else is here."""
        sandbox_id, separator, path = word.partition(":")
        return cls(sandbox_id, path) if separator and is_sandbox_id(sandbox_id) else cls("", word)


def own_name(path: str) -> bytes:
    """Returns the name that a copy of `path` gets in a folder; b"" where its contents go there, as for "." or "/"."""
    name = os.fsencode(os.path.basename(path.rstrip("/")))  # noqa: PTH119  bytes of any kind
    return b"" if name in (b".", b"..") else name


async def cp(
    source: Annotated[str, typer.Argument(metavar="SRC", help="ID:PATH, a path here, or - for standard input.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="ID:PATH, a path here, or - for standard output.")],
    follow_link: Annotated[
        bool, typer.Option("--follow-link", "-L", help="If SRC is a symbolic link, copy what it leads to.")
    ] = False,
) -> int:
    """Copy files and folders between this machine and a sandbox.

    As cp does: into DST if that is a folder; "SRC/." means what is in SRC. Modes, times and symbolic links are kept;
    files get the sandbox's root, or the user here, as their owner. Device files and their like are left out, and the
    exit status is then 1; set-user-ID bits do not come out of a sandbox.
    """
    from agent.cli.transfer.progress import Transfer

    here, there = Place.of(source), Place.of(target)
    if bool(here.sandbox_id) == bool(there.sandbox_id):
        raise typer.BadParameter("one of SRC and DST must be ID:PATH, the other a path on this machine")
    if output.json_wanted() and target == "-":
        raise typer.BadParameter("--json and a copy to standard output exclude each other")
    follow = follow_link or source.endswith("/")
    transfer = Transfer()
    async with connected() as api:
        with transfer:
            await _copy(api, transfer, here, there, follow=follow)
    for path in transfer.left_out:
        warn(f"left out {path}: it is not a file, a folder or a symbolic link")
    if output.json_wanted():
        output.emit(
            {
                "files": transfer.files,
                "folders": transfer.folders,
                "links": transfer.links,
                "bytes": transfer.bytes,
                "left_out": transfer.left_out,
            }
        )
    return 1 if transfer.left_out else 0


async def _copy(api: Api, transfer: Transfer, source: Place, target: Place, *, follow: bool) -> None:
    from agent.cli.transfer.guest_files import GuestFiles, absolute

    if source.sandbox_id:
        from agent.cli.transfer.download import download

        files = GuestFiles(api, source.sandbox_id)
        await download(files, transfer, absolute(source.path), target.path, follow=follow)
    else:
        from agent.cli.transfer.upload import upload

        await upload(GuestFiles(api, target.sandbox_id), transfer, source.path, target.path, follow=follow)
