"""Copies from this machine to a sandbox."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from functools import partial

from agent.cli import stdio
from agent.cli.errors import CliError
from agent.cli.formatting import printable
from agent.cli.transfer.entry import Entry, Kind, copy_name, guest_path, local_entry
from agent.cli.transfer.guest_files import GuestFiles
from agent.cli.transfer.progress import Transfer, WorkerPool

_CHUNK_BYTES = 256 << 10


async def upload(files: GuestFiles, transfer: Transfer, source: str, target: str, *, follow: bool) -> None:
    """Copy `source` of this machine to `target` in the sandbox; "-" is standard input.

    :raises CliError: `target` does not fit `source`, or the sandbox refuses data.
    :raises OSError: a file here cannot be read.
    :raises grpc.aio.AioRpcError: a call failed.
    """
    if source == "-":
        async with aclosing(_stdin_chunks(transfer)) as data:
            await files.write(guest_path(target), 0o644, data)
        transfer.files += 1
        return
    entry = local_entry(os.fsencode(source), follow=follow)
    destination = await _resolve_target(files, source, target, directory=entry.kind is Kind.DIRECTORY)
    if entry.kind is Kind.DIRECTORY:
        await _TreeUpload(files, transfer, entry.path, destination).run(entry)
    else:
        transfer.expect(entry.size_bytes)
        await _copy_entry(files, transfer, entry, destination)


async def _resolve_target(files: GuestFiles, source: str, target: str, *, directory: bool) -> bytes:
    """Return the path of the copy in the guest, as cp(1) chooses it."""
    wanted = guest_path(target)
    found = await files.stat(wanted, follow=True)
    if found is not None and found.kind is Kind.DIRECTORY:
        name = copy_name(source)
        return b"/".join((wanted.rstrip(b"/"), name)) if name else wanted
    if found is not None and directory:
        raise CliError(f"{target} in the sandbox is not a directory, but the source is one", reason="NOT_A_FOLDER")
    if target.endswith("/") and not directory:
        raise CliError(f"{target}: no such directory in the sandbox", reason="ENOENT")
    return wanted.rstrip(b"/")


async def _stdin_chunks(transfer: Transfer) -> AsyncGenerator[bytes, None]:
    while data := await stdio.read(sys.stdin.fileno(), _CHUNK_BYTES):
        transfer.advance(len(data))
        yield data


async def _file_chunks(transfer: Transfer, path: bytes) -> AsyncGenerator[bytes, None]:
    with open(path, "rb", buffering=0) as file:  # noqa: ASYNC230, PTH123  a local disk answers at once
        while data := file.read(_CHUNK_BYTES):
            transfer.advance(len(data))
            yield data


class _TreeUpload:
    """Copies one directory and its content."""

    def __init__(self, files: GuestFiles, transfer: Transfer, root: bytes, destination: bytes) -> None:
        self._files = files
        self._transfer = transfer
        self._root = root
        self._destination = destination
        self._directories: list[tuple[bytes, Entry]] = []

    async def run(self, root: Entry) -> None:
        self._transfer.expect(sum(entry.size_bytes for entry in _walk(self._root) if entry.kind is Kind.FILE))
        await self._make_directory(self._destination, root)
        async with WorkerPool() as pool:
            for entry in _walk(self._root):
                destination = self._destination.rstrip(b"/") + entry.path[len(self._root.rstrip(b"/")) :]
                if entry.kind is Kind.DIRECTORY:
                    await self._make_directory(destination, entry)
                else:
                    await pool.start(partial(_copy_entry, self._files, self._transfer, entry, destination))
        for destination, entry in reversed(self._directories):  # last, since writing in a directory changes its time
            await self._files.set_metadata(destination, entry.mode, entry.mtime_ns)

    async def _make_directory(self, destination: bytes, entry: Entry) -> None:
        if await self._files.make_directory(destination, entry.mode):
            self._directories.append((destination, entry))
        self._transfer.directories += 1


def _walk(root: bytes) -> Iterator[Entry]:
    """Yield the files below a directory, parents first, siblings by name; do not follow links."""
    for name in sorted(os.listdir(root)):  # noqa: PTH208  bytes of any kind
        path = root.rstrip(b"/") + b"/" + name
        entry = local_entry(path, follow=False)
        yield entry
        if entry.kind is Kind.DIRECTORY:
            yield from _walk(path)


async def _copy_entry(files: GuestFiles, transfer: Transfer, entry: Entry, destination: bytes) -> None:
    if entry.kind is Kind.LINK:
        await files.make_link(destination, entry.target)
        transfer.links += 1
    elif entry.kind is Kind.FILE:
        async with aclosing(_file_chunks(transfer, entry.path)) as data:  # closes the file however the call ends
            await files.write(destination, entry.mode, data)
        await files.set_metadata(destination, entry.mode, entry.mtime_ns)
        transfer.files += 1
    else:
        transfer.skipped.append(printable(os.fsdecode(entry.path)))
