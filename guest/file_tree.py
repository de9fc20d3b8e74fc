"""Serve fs.list, fs.walk, fs.glob, fs.remove and fs.copy. Long operations yield to other calls (checkpoint)."""

from __future__ import annotations

import errno
import os
import stat

from guest import params, reactor
from guest.call import Call
from guest.params import AsUser
from guest.pattern import Pattern
from guest.wire import CallError, Frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from guest.call import Handler

_PAGE = 128
_COPY_BYTES = 4 << 20
_MAX_DEPTH = 256  # limits memory and descriptors: a guest can make trees of any depth
_TYPES = {
    stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink", stat.S_IFBLK: "block",
    stat.S_IFCHR: "character", stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket",
}  # fmt: skip
_O_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def describe(path: str, facts: os.stat_result) -> dict[str, object]:
    """Return the facts of one file as JSON, from its lstat(2) or stat(2)."""
    kind = facts.st_mode
    info: dict[str, object] = {
        "path": path,
        "type": _TYPES.get(stat.S_IFMT(kind), "other"),
        "size": facts.st_size, "mode": stat.S_IMODE(kind), "uid": facts.st_uid, "gid": facts.st_gid,
        "mtime_ns": facts.st_mtime_ns, "atime_ns": facts.st_atime_ns, "ctime_ns": facts.st_ctime_ns,
        "nlink": facts.st_nlink, "ino": facts.st_ino, "dev": facts.st_dev, "blocks": facts.st_blocks,
        "blksize": facts.st_blksize, "rdev": facts.st_rdev,
    }  # fmt: skip
    if stat.S_ISLNK(kind):
        try:
            info["target"] = os.readlink(path)
        except OSError:
            info["target"] = ""  # it was removed or replaced since
    return info


def require_regular(fd: int, path: str) -> None:
    """Refuse files whose reading or writing could block PID 1: pipes, terminals, devices.

    :raises IsADirectoryError: the descriptor is a directory.
    :raises CallError: the descriptor is not a regular file.
    """
    kind = os.fstat(fd).st_mode
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(kind):
        raise CallError(
            "STATE", f"{path}: is not a regular file; read or write it with a process such as cat", "NOT_REGULAR"
        )


class _Pages:
    """Sends entries to the host in pages of _PAGE entries."""

    def __init__(self, call: Call, rights: AsUser) -> None:
        self._call = call
        self._rights = rights
        self._entries: list[dict[str, object]] = []

    async def add(self, path: str) -> None:
        try:
            with self._rights:
                self._entries.append(describe(path, os.lstat(path)))
        except FileNotFoundError:
            return  # removed since it was listed
        if len(self._entries) >= _PAGE:
            await self.flush()

    async def flush(self) -> None:
        if self._entries:
            await self._call.send_json(Frame.EVENT, {"entries": self._entries})
            self._entries = []
        await reactor.checkpoint()


def _join(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}"


async def _list(call: Call) -> dict[str, object]:
    path, rights = params.path(call.req), AsUser(call.req)
    pages = _Pages(call, rights)
    with rights:
        opened = os.scandir(path)
    with opened:
        for entry in opened:
            await pages.add(_join(path, entry.name))
    await pages.flush()
    return {}


async def _tree(root: str, max_depth: int, rights: AsUser, *, follow: bool) -> AsyncIterator[tuple[str, int]]:
    """Yield (path, depth) of `root` and all below, parents first, siblings by name.

    :param follow: enter symbolic links to directories; a directory is not entered again below itself.
    """
    stack = [(root, 0, frozenset[tuple[int, int]]())]
    while stack:
        path, depth, above = stack.pop()
        yield path, depth
        if depth >= max_depth:
            continue
        try:
            with rights:
                facts = os.stat(path, follow_symlinks=follow or depth == 0)
                identity = (facts.st_dev, facts.st_ino)
                if not stat.S_ISDIR(facts.st_mode) or identity in above:
                    continue
                names = sorted(os.listdir(path), reverse=True)
        except OSError as error:
            if depth == 0:
                raise
            if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.ELOOP):
                continue
            raise
        inside = above | {identity}
        stack.extend((_join(path, name), depth + 1, inside) for name in names)
        await reactor.checkpoint()


async def _walk(call: Call) -> dict[str, object]:
    root = params.path(call.req)
    depth = params.optional_number(call.req, "max_depth", 1 << 31)
    rights = AsUser(call.req)
    with rights:
        os.lstat(root)
    pages = _Pages(call, rights)
    depth = min(_MAX_DEPTH, _MAX_DEPTH if depth is None else depth)
    async for path, _ in _tree(root, depth, rights, follow=bool(call.req.get("follow"))):
        await pages.add(path)
    await pages.flush()
    return {}


async def _glob(call: Call) -> dict[str, object]:
    root = params.path(call.req, "root").rstrip("/") or "/"
    text = params.path({"path": call.req.get("pattern")}) if str(call.req.get("pattern")).startswith("/") else None
    pattern = Pattern(text[1:] if text else str(call.req.get("pattern")), hidden=bool(call.req.get("include_hidden")))
    base = "/" if text else root
    start = _join(base, pattern.fixed) if pattern.fixed else base
    rights = AsUser(call.req)
    with rights:
        if not os.path.lexists(start):
            return {}
    pages = _Pages(call, rights)
    async for path, _ in _tree(start, _MAX_DEPTH, rights, follow=False):
        relative = path[len(base.rstrip("/")) + 1 :]
        if pattern.matches(relative) and not (call.req.get("exclude_directories") and os.path.isdir(path)):
            await pages.add(path)
    await pages.flush()
    return {}


async def _remove(call: Call) -> dict[str, object]:
    path = params.path(call.req).rstrip("/")
    if not path or path in ("/.", "/.."):
        raise CallError("INVALID", "the root directory cannot be removed")
    rights = AsUser(call.req)
    with rights:
        facts = os.lstat(path)
        if not stat.S_ISDIR(facts.st_mode):
            os.unlink(path)
            return {}
        if not call.req.get("recursive"):
            os.rmdir(path)
            return {}
    await _remove_tree(path, facts, rights)
    return {}


async def _remove_tree(path: str, facts: os.stat_result, rights: AsUser) -> None:
    """Remove a directory tree by descriptors, so that a symbolic link swapped in cannot redirect it."""
    with rights:
        parent = os.open(os.path.dirname(path) or "/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        await _remove_directory(parent, os.path.basename(path), facts.st_dev, path, 0, rights)
    finally:
        os.close(parent)


async def _remove_directory(parent: int, name: str, device: int, path: str, depth: int, rights: AsUser) -> None:
    with rights:
        fd = os.open(name, _O_DIR, dir_fd=parent)
    try:
        await _empty(fd, device, path, depth, rights)
    finally:
        os.close(fd)
    with rights:
        os.rmdir(name, dir_fd=parent)


async def _empty(directory: int, device: int, path: str, depth: int, rights: AsUser) -> None:
    if depth > _MAX_DEPTH:
        raise CallError("STATE", f"{path}: is nested more than {_MAX_DEPTH} directories deep", "ELOOP")
    for name in os.listdir(directory):
        with rights:
            facts = os.lstat(name, dir_fd=directory)
            if not stat.S_ISDIR(facts.st_mode):
                os.unlink(name, dir_fd=directory)
                continue
        if facts.st_dev != device:
            raise CallError("STATE", f"{path}/{name}: is another file system; unmount it first", "EXDEV")
        await _remove_directory(directory, name, device, f"{path}/{name}", depth + 1, rights)
    await reactor.checkpoint()


async def _copy(call: Call) -> dict[str, object]:
    source, target = params.path(call.req), params.path(call.req, "new_path")
    rights = AsUser(call.req)
    with rights:
        facts = os.stat(source)
        is_directory, onto_directory = stat.S_ISDIR(facts.st_mode), os.path.isdir(target)
        inside, outside = os.path.realpath(target), os.path.realpath(source)
    if not is_directory:
        if onto_directory:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
        await _copy_file(source, target, rights)
        return {}
    if not call.req.get("recursive"):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), source)
    if inside == outside or inside.startswith(outside.rstrip("/") + "/"):
        raise CallError("INVALID", f"{target}: a directory cannot be copied into itself")
    await _copy_tree(source, target, rights)
    return {}


async def _copy_tree(source: str, target: str, rights: AsUser) -> None:
    directories = []
    async for path, depth in _tree(source, _MAX_DEPTH, rights, follow=False):
        copy = target if depth == 0 else _join(target, path[len(source.rstrip("/")) + 1 :])
        with rights:
            entry = os.stat(path) if depth == 0 else os.lstat(path)
            if stat.S_ISDIR(entry.st_mode):
                os.makedirs(copy, 0o700, exist_ok=True)
                directories.append((copy, entry))
            elif stat.S_ISLNK(entry.st_mode):
                os.symlink(os.readlink(path), copy)
                _copy_facts(copy, entry, rights)
        if stat.S_ISREG(entry.st_mode):
            await _copy_file(path, copy, rights)
    for copy, entry in reversed(directories):  # at the end, since adding entries to a directory changes its times
        with rights:
            _copy_facts(copy, entry, rights)


async def _copy_file(source: str, target: str, rights: AsUser) -> None:
    """Copy data extents, mode and times; holes are kept. Opens without blocking: a pipe must not stop PID 1."""
    with rights:
        reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        require_regular(reading, source)
        facts = os.fstat(reading)
        with rights:
            writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0o600)
        try:
            require_regular(writing, target)
            if os.path.samestat(facts, os.fstat(writing)):
                raise CallError("INVALID", f"{source} and {target} are the same file")
            os.ftruncate(writing, 0)  # not before it is known that source and target differ
            await _copy_data(reading, writing, facts.st_size)
        finally:
            os.close(writing)
    finally:
        os.close(reading)
    with rights:
        _copy_facts(target, facts, rights)


async def _copy_data(reading: int, writing: int, size: int) -> None:
    at = 0
    while at < size:
        try:
            at = os.lseek(reading, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # the rest is a hole
            raise
        end = os.lseek(reading, at, os.SEEK_HOLE)
        while at < end:
            # Not copy_file_range(2): it fails with EXDEV between a disk and a tmpfs.
            os.lseek(writing, at, os.SEEK_SET)
            done = os.sendfile(writing, reading, at, min(_COPY_BYTES, end - at))
            if not done:
                return
            at += done
            await reactor.checkpoint()
    os.ftruncate(writing, size)


def _copy_facts(path: str, facts: os.stat_result, rights: AsUser) -> None:
    follow = not stat.S_ISLNK(facts.st_mode)
    if rights.user is None:  # copies made as a user belong to that user
        os.chown(path, facts.st_uid, facts.st_gid, follow_symlinks=follow)
    if follow:  # a symbolic link has no mode of its own
        os.chmod(path, stat.S_IMODE(facts.st_mode))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns), follow_symlinks=follow)


OPS: dict[str, Handler] = {
    "fs.list": _list, "fs.walk": _walk, "fs.glob": _glob, "fs.remove": _remove, "fs.copy": _copy,
}  # fmt: skip
