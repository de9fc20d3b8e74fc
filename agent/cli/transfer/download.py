"""From a sandbox to this machine. What the sandbox says is hostile; see `agent.cli.transfer.host_tree`."""

from __future__ import annotations

import os
import sys
from functools import partial

from agent.cli.commands.copy import own_name
from agent.cli.errors import CliError
from agent.cli.terminal import stdio
from agent.cli.text import printable
from agent.cli.transfer.guest_files import Entry, GuestFiles, Kind
from agent.cli.transfer.host_tree import HostTree, Names, names_below, set_facts
from agent.cli.transfer.progress import Pool, Transfer


async def download(files: GuestFiles, transfer: Transfer, source: bytes, target: str, *, follow: bool) -> None:
    """Copies `source` of the sandbox to `target` here; "-" is standard output.

    :raises CliError: what is there cannot be copied there. :raises OSError: this machine's disk.
    """
    if target == "-":
        await _to_stdout(files, transfer, source)
        return
    found = await files.stat(source, follow=follow)
    if found is None:
        raise CliError(f"{os.fsdecode(source)}: no such file in the sandbox", reason="ENOENT")
    tree, names = _place(os.fsdecode(source), target, folder=found.kind is Kind.FOLDER)
    if found.kind is Kind.FILE:
        transfer.expect(found.size_bytes)
    if found.kind is Kind.FOLDER:
        await _Tree(files, transfer, tree, source, names).run(found)
    else:
        await _one(files, transfer, tree, names, found)


def _place(source: str, target: str, *, folder: bool) -> tuple[HostTree, Names]:
    """Returns the trusted folder to write below, and the names in it that the copy gets."""
    if os.path.isdir(target):  # noqa: PTH112  bytes of any kind
        name = own_name(source)
        return HostTree(target), (name,) if name else ()
    parent, last = os.path.split(target.rstrip("/"))
    if (target.endswith("/") and not folder) or not os.path.isdir(parent or "."):  # noqa: PTH112
        raise CliError(f"{parent if not target.endswith('/') else target}: no such folder here", reason="ENOENT")
    if folder and os.path.lexists(target):
        raise CliError(f"{target} is not a folder, but the source is one", reason="NOT_A_FOLDER")
    return HostTree(parent or "."), (os.fsencode(last),)


async def _to_stdout(files: GuestFiles, transfer: Transfer, source: bytes) -> None:
    sink = stdio.Output(sys.stdout.fileno())
    async for data in files.read(source):
        await sink.write(data)
        transfer.advance(len(data))
    transfer.files += 1


class _Tree:
    """One folder on its way out."""

    def __init__(self, files: GuestFiles, transfer: Transfer, tree: HostTree, root: bytes, names: Names) -> None:
        self._files = files
        self._transfer = transfer
        self._tree = tree
        self._root = root
        self._names = names
        self._folders: list[tuple[Names, Entry]] = []

    async def run(self, root: Entry) -> None:
        if self._names:
            self._make_folder(self._names, root)
        async with Pool() as pool:
            async for entry in self._files.walk(self._root):
                names = (*self._names, *names_below(self._root, entry.path))
                if entry.kind is Kind.FOLDER:
                    self._make_folder(names, entry)
                else:
                    await pool.start(partial(_one, self._files, self._transfer, self._tree, names, entry))
        for names, entry in reversed(self._folders):  # last, since filling a folder changes its time
            self._tree.set_folder_facts(names, entry.mode, entry.mtime_ns)

    def _make_folder(self, names: Names, entry: Entry) -> None:
        if self._tree.make_folder(names):
            self._folders.append((names, entry))
        self._transfer.folders += 1


async def _one(files: GuestFiles, transfer: Transfer, tree: HostTree, names: Names, entry: Entry) -> None:
    if entry.kind is Kind.LINK:
        tree.make_link(names, entry.target, entry.mtime_ns)
        transfer.links += 1
    elif entry.kind is Kind.FILE:
        with tree.new_file(names) as fd:
            async for data in files.read(entry.path):
                _write_all(fd, data)
                transfer.advance(len(data))
            set_facts(fd, entry.mode, entry.mtime_ns)
        transfer.files += 1
    else:
        transfer.left_out.append(printable(os.fsdecode(entry.path)))


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
