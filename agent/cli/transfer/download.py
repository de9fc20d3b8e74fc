"""Copies from a sandbox to this machine. Paths and metadata are hostile; see `agent.cli.transfer.host_tree`."""

from __future__ import annotations

import os
import sys
from functools import partial

from agent.cli import stdio
from agent.cli.errors import CliError
from agent.cli.formatting import printable
from agent.cli.transfer.entry import Entry, Kind, copy_name
from agent.cli.transfer.guest_files import GuestFiles
from agent.cli.transfer.host_tree import HostTree, Names, names_below, set_metadata
from agent.cli.transfer.progress import Transfer, WorkerPool


async def download(files: GuestFiles, transfer: Transfer, source: bytes, target: str, *, follow: bool) -> None:
    """Copy `source` of the sandbox to `target` on this machine; "-" is standard output.

    :raises CliError: `source` does not exist, `target` does not fit it, or the sandbox's listing is malformed.
    :raises OSError: a file here cannot be written.
    :raises grpc.aio.AioRpcError: a call failed.
    """
    if target == "-":
        await _to_stdout(files, transfer, source)
        return
    found = await files.stat(source, follow=follow)
    if found is None:
        raise CliError(f"{os.fsdecode(source)}: no such file in the sandbox", reason="ENOENT")
    tree, names = _resolve_target(os.fsdecode(source), target, directory=found.kind is Kind.DIRECTORY)
    if found.kind is Kind.FILE:
        transfer.expect(found.size_bytes)
    if found.kind is Kind.DIRECTORY:
        await _TreeDownload(files, transfer, tree, source, names).run(found)
    else:
        await _copy_entry(files, transfer, tree, names, found)


def _resolve_target(source: str, target: str, *, directory: bool) -> tuple[HostTree, Names]:
    """Return the existing directory to write below, and the names of the copy in it, as cp(1) chooses them."""
    if os.path.isdir(target):  # noqa: PTH112  bytes of any kind
        name = copy_name(source)
        return HostTree(target), (name,) if name else ()
    parent, last = os.path.split(target.rstrip("/"))
    if (target.endswith("/") and not directory) or not os.path.isdir(parent or "."):  # noqa: PTH112
        raise CliError(f"{parent if not target.endswith('/') else target}: no such directory here", reason="ENOENT")
    if directory and os.path.lexists(target):
        raise CliError(f"{target} is not a directory, but the source is one", reason="NOT_A_FOLDER")
    return HostTree(parent or "."), (os.fsencode(last),)


async def _to_stdout(files: GuestFiles, transfer: Transfer, source: bytes) -> None:
    writer = stdio.Writer(sys.stdout.fileno())
    async for data in files.read(source):
        await writer.write(data)
        transfer.advance(len(data))
    transfer.files += 1


class _TreeDownload:
    """Copies one directory and its content."""

    def __init__(self, files: GuestFiles, transfer: Transfer, tree: HostTree, root: bytes, names: Names) -> None:
        self._files = files
        self._transfer = transfer
        self._tree = tree
        self._root = root
        self._names = names
        self._directories: list[tuple[Names, Entry]] = []

    async def run(self, root: Entry) -> None:
        if self._names:
            self._make_directory(self._names, root)
        async with WorkerPool() as pool:
            async for entry in self._files.walk(self._root):
                names = (*self._names, *names_below(self._root, entry.path))
                if entry.kind is Kind.DIRECTORY:
                    self._make_directory(names, entry)
                else:
                    await pool.start(partial(_copy_entry, self._files, self._transfer, self._tree, names, entry))
        for names, entry in reversed(self._directories):  # last, since writing in a directory changes its time
            self._tree.set_directory_metadata(names, entry.mode, entry.mtime_ns)

    def _make_directory(self, names: Names, entry: Entry) -> None:
        if self._tree.make_directory(names):
            self._directories.append((names, entry))
        self._transfer.directories += 1


async def _copy_entry(files: GuestFiles, transfer: Transfer, tree: HostTree, names: Names, entry: Entry) -> None:
    if entry.kind is Kind.LINK:
        tree.make_link(names, entry.target, entry.mtime_ns)
        transfer.links += 1
    elif entry.kind is Kind.FILE:
        with tree.new_file(names) as fd:
            async for data in files.read(entry.path):
                _write_all(fd, data)
                transfer.advance(len(data))
            set_metadata(fd, entry.mode, entry.mtime_ns)
        transfer.files += 1
    else:
        transfer.skipped.append(printable(os.fsdecode(entry.path)))


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
