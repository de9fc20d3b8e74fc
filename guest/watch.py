"""Serve fs.watch: report changes below a path, by inotify(7)."""

from __future__ import annotations

import errno
import os
import stat
import struct

from guest import kernel, params, reactor
from guest.call import Call
from guest.wire import CallError, Frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.call import Handler

_MAX_WATCHES = 16384
_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE, _DELETE_SELF, _MOVE_SELF = 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
_OVERFLOW, _IGNORED, _ISDIR, _DONT_FOLLOW = 0x4000, 0x8000, 0x40000000, 0x02000000
_MASK = _MODIFY | _ATTRIB | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF
_HEAD = struct.Struct("iIII")
_RENAME_GRACE_S = 0.05  # wait for IN_MOVED_TO after IN_MOVED_FROM


class _Watcher:
    """An inotify descriptor, and the path of each of its watch descriptors."""

    def __init__(self, root: str, *, recursive: bool) -> None:
        self._root = root
        self._recursive = recursive
        self._paths: dict[int, str] = {}
        self._moved: dict[int, tuple[str, bool]] = {}  # cookie -> (old path, is a directory)
        self.fd = kernel.inotify_init(root)

    async def add(self, path: str, found: list[dict[str, object]] | None = None) -> None:
        """Watch `path` and, if recursive, all directories below.

        :param found: list to which a create event is added for each entry below `path`.
        :raises CallError: too many directories.
        :raises OSError: `path` cannot be watched.
        """
        self._add_one(path)
        if not self._recursive or not stat.S_ISDIR(os.lstat(path).st_mode):
            return
        pending = [path]
        while pending:
            directory = pending.pop()
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        if found is not None:
                            found.append({"type": "create", "path": entry.path})
                        if entry.is_dir(follow_symlinks=False):
                            self._add_one(entry.path)
                            pending.append(entry.path)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
            await reactor.checkpoint()

    def _add_one(self, path: str) -> None:
        if len(self._paths) >= _MAX_WATCHES:
            raise CallError(
                "EXHAUSTED", f"more than {_MAX_WATCHES} directories below {self._root}; watch fewer", "ENOSPC"
            )
        mask = _MASK if path == self._root else _MASK | _DONT_FOLLOW
        self._paths[kernel.inotify_add_watch(self.fd, path, mask)] = path

    async def events(self, data: bytes) -> list[dict[str, object]]:
        """Return the events in `data` (struct inotify_event); watch new directories if recursive."""
        result: list[dict[str, object]] = []
        at = 0
        while at < len(data):
            watch, mask, cookie, length = _HEAD.unpack_from(data, at)
            name = os.fsdecode(data[at + _HEAD.size : at + _HEAD.size + length].rstrip(b"\0"))
            at += _HEAD.size + length
            if mask & _OVERFLOW:
                result.append({"type": "overflow", "path": self._root})
            elif watch in self._paths:
                path = self._paths[watch]
                await self._event(f"{path.rstrip('/')}/{name}" if name else path, watch, mask, cookie, result)
        return result

    async def _event(self, path: str, watch: int, mask: int, cookie: int, result: list[dict[str, object]]) -> None:
        if mask & _IGNORED:
            self._paths.pop(watch, None)
        elif mask & (_DELETE_SELF | _MOVE_SELF):
            if path == self._root:
                result.append({"type": "remove", "path": path})
        elif mask & _MOVED_FROM:
            self._moved[cookie] = (path, bool(mask & _ISDIR))
        elif mask & _MOVED_TO and cookie in self._moved:
            old, is_directory = self._moved.pop(cookie)
            if is_directory:
                self._rename_below(old, path)
            result.append({"type": "rename", "path": old, "new_path": path})
        elif mask & (_CREATE | _MOVED_TO):
            result.append({"type": "create", "path": path})
            if mask & _ISDIR and self._recursive:
                try:
                    await self.add(path, result)
                except FileNotFoundError:
                    return
        elif mask & _DELETE:
            result.append({"type": "remove", "path": path})
        elif mask & _MODIFY:
            result.append({"type": "modify", "path": path})
        elif mask & _ATTRIB:
            result.append({"type": "attributes", "path": path})

    def _rename_below(self, old: str, new: str) -> None:
        for watch, path in self._paths.items():
            if path == old or path.startswith(f"{old}/"):
                self._paths[watch] = new + path[len(old) :]

    def _forget_below(self, gone: str) -> None:
        for watch, path in list(self._paths.items()):
            if path == gone or path.startswith(f"{gone}/"):
                del self._paths[watch]
                kernel.inotify_rm_watch(self.fd, watch)

    def moved_away(self) -> list[dict[str, object]]:
        """Return a remove event for each path that was renamed out of the tree, and stop watching it."""
        gone, self._moved = self._moved, {}
        for path, is_directory in gone.values():
            if is_directory:
                self._forget_below(path)
        return [{"type": "remove", "path": path} for path, _ in gone.values()]

    @property
    def waits_for_rename(self) -> bool:
        """True if an IN_MOVED_TO may follow an IN_MOVED_FROM."""
        return bool(self._moved)


async def _watch(call: Call) -> dict[str, object]:
    watcher = _Watcher(params.path(call.req), recursive=bool(call.req.get("recursive")))
    reactor.register(watcher.fd)
    try:
        await watcher.add(params.path(call.req))
        await call.send_json(Frame.EVENT, {"ready": True})
        while True:
            try:
                data = os.read(watcher.fd, 64 << 10)
            except BlockingIOError:
                if watcher.waits_for_rename:
                    await reactor.sleep(_RENAME_GRACE_S)
                    events = await _read_more(watcher)
                else:
                    await reactor.readable(watcher.fd)
                    continue
            else:
                events = await watcher.events(data)
            for event in events:
                await call.send_json(Frame.EVENT, event)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CallError(
                "EXHAUSTED", "the limit of the guest's kernel for inotify watches is reached", "ENOSPC"
            ) from None
        raise
    finally:
        reactor.unregister(watcher.fd)
        os.close(watcher.fd)


async def _read_more(watcher: _Watcher) -> list[dict[str, object]]:
    """Read the rest of the events; count renames that are still incomplete as moves out of the tree."""
    try:
        events = await watcher.events(os.read(watcher.fd, 64 << 10))
    except BlockingIOError:
        events = []
    return events + watcher.moved_away()


OPS: dict[str, Handler] = {"fs.watch": _watch}
