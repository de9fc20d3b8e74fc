"""From this machine to a sandbox."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from functools import partial

from agent.cli.commands.copy import own_name
from agent.cli.errors import CliError
from agent.cli.terminal import stdio
from agent.cli.text import printable
from agent.cli.transfer.guest_files import Entry, GuestFiles, Kind, absolute, kind_of
from agent.cli.transfer.progress import Pool, Transfer

_PIECE_BYTES = 256 << 10


async def upload(files: GuestFiles, transfer: Transfer, source: str, target: str, *, follow: bool) -> None:
    """Copies `source` of this machine to `target` in the sandbox; "-" is standard input.

    :raises CliError: what is here cannot be copied there. :raises OSError: `source` cannot be read.
    """
    if source == "-":
        async with aclosing(_from_stdin(transfer)) as data:
            await files.write(absolute(target), 0o644, data)
        transfer.files += 1
        return
    entry = local_entry(os.fsencode(source), follow=follow)
    place = await _place(files, source, target, folder=entry.kind is Kind.FOLDER)
    if entry.kind is Kind.FOLDER:
        await _Tree(files, transfer, entry.path, place).run(entry)
    else:
        transfer.expect(entry.size_bytes)
        await _one(files, transfer, entry, place)


def local_entry(path: bytes, *, follow: bool) -> Entry:
    """Returns the facts of a file here. :raises OSError: it is missing."""
    facts = os.stat(path, follow_symlinks=follow)  # noqa: PTH116  bytes of any kind
    target = os.readlink(path) if stat.S_ISLNK(facts.st_mode) else b""  # noqa: PTH115  bytes of any kind
    return Entry(path, kind_of(facts.st_mode), facts.st_size, stat.S_IMODE(facts.st_mode), facts.st_mtime_ns, target)


async def _place(files: GuestFiles, source: str, target: str, *, folder: bool) -> bytes:
    """Returns the path that the copy gets."""
    wanted = absolute(target)
    found = await files.stat(wanted, follow=True)
    if found is not None and found.kind is Kind.FOLDER:
        name = own_name(source)
        return b"/".join((wanted.rstrip(b"/"), name)) if name else wanted
    if found is not None and folder:
        raise CliError(f"{target} in the sandbox is not a folder, but the source is one", reason="NOT_A_FOLDER")
    if target.endswith("/") and not folder:
        raise CliError(f"{target}: no such folder in the sandbox", reason="ENOENT")
    return wanted.rstrip(b"/")


async def _from_stdin(transfer: Transfer) -> AsyncGenerator[bytes, None]:
    while data := await stdio.read(sys.stdin.fileno(), _PIECE_BYTES):
        transfer.advance(len(data))
        yield data


async def _pieces(transfer: Transfer, path: bytes) -> AsyncGenerator[bytes, None]:
    with open(path, "rb", buffering=0) as file:  # noqa: ASYNC230, PTH123  a local disk answers at once
        while data := file.read(_PIECE_BYTES):
            transfer.advance(len(data))
            yield data


class _Tree:
    """One folder on its way in."""

    def __init__(self, files: GuestFiles, transfer: Transfer, root: bytes, place: bytes) -> None:
        self._files = files
        self._transfer = transfer
        self._root = root
        self._place = place
        self._folders: list[tuple[bytes, Entry]] = []

    async def run(self, root: Entry) -> None:
        self._transfer.expect(sum(entry.size_bytes for entry in _below(self._root) if entry.kind is Kind.FILE))
        await self._make_folder(self._place, root)
        async with Pool() as pool:
            for entry in _below(self._root):
                place = self._place.rstrip(b"/") + entry.path[len(self._root.rstrip(b"/")) :]
                if entry.kind is Kind.FOLDER:
                    await self._make_folder(place, entry)
                else:
                    await pool.start(partial(_one, self._files, self._transfer, entry, place))
        for place, entry in reversed(self._folders):  # last, since filling a folder changes its time
            await self._files.set_facts(place, entry.mode, entry.mtime_ns)

    async def _make_folder(self, place: bytes, entry: Entry) -> None:
        if await self._files.make_folder(place, entry.mode):
            self._folders.append((place, entry))
        self._transfer.folders += 1


def _below(root: bytes) -> Iterator[Entry]:
    """Yields what is below a folder, parents first, siblings by name; links are not followed."""
    for name in sorted(os.listdir(root)):  # noqa: PTH208  bytes of any kind
        path = root.rstrip(b"/") + b"/" + name
        entry = local_entry(path, follow=False)
        yield entry
        if entry.kind is Kind.FOLDER:
            yield from _below(path)


async def _one(files: GuestFiles, transfer: Transfer, entry: Entry, place: bytes) -> None:
    if entry.kind is Kind.LINK:
        await files.make_link(place, entry.target)
        transfer.links += 1
    elif entry.kind is Kind.FILE:
        async with aclosing(_pieces(transfer, entry.path)) as data:  # the file is closed however the call ends
            await files.write(place, entry.mode, data)
        await files.set_facts(place, entry.mode, entry.mtime_ns)
        transfer.files += 1
    else:
        transfer.left_out.append(printable(os.fsdecode(entry.path)))
