"""File contents and single files: the calls fs.read, write, stat, mkdir, rename, link and their like."""

from __future__ import annotations

import os

from guest import fields, reactor
from guest.call import CHUNK_BYTES, HEADROOM, Call
from guest.fields import AsUser
from guest.trees import OPS as TREE_OPS
from guest.trees import describe, require_regular
from guest.watch import OPS as WATCH_OPS
from guest.wire import CallError, Frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.call import Handler

_TURN_BYTES = 1 << 20  # after so many bytes other calls get their turn
_MAX_TEMP_TRIES = 100


async def _read(call: Call) -> dict[str, object]:
    path = fields.path(call.req)
    offset, length = fields.number(call.req, "offset"), fields.number(call.req, "length")
    with AsUser(call.req):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        require_regular(fd, path)
        buffer = bytearray(HEADROOM + CHUNK_BYTES)
        view = memoryview(buffer)[HEADROOM:]
        total = 0
        while not length or total < length:
            want = CHUNK_BYTES if not length else min(CHUNK_BYTES, length - total)
            size = os.preadv(fd, [view[:want]], offset + total)
            if not size:
                break
            await call.send_buffer(Frame.DATA, buffer, size)
            total += size
            if total % _TURN_BYTES < CHUNK_BYTES:
                await reactor.checkpoint()
        return {"bytes": total}
    finally:
        os.close(fd)


_DISPOSITIONS = {
    "truncate": os.O_CREAT | os.O_TRUNC,
    "append": os.O_CREAT | os.O_APPEND,
    "create_new": os.O_CREAT | os.O_EXCL,
    "keep": os.O_CREAT,
}


def _open_for_writing(call: Call, path: str) -> int:
    flags = _DISPOSITIONS.get(str(call.req.get("disposition")))
    if flags is None:
        raise CallError("INVALID", f"unknown disposition {str(call.req.get('disposition'))[:40]!r}")
    if call.req.get("must_exist"):
        flags &= ~os.O_CREAT
    # Truncation waits until the file is known to be a regular one.
    opening = flags & ~os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    mode = fields.mode(call.req, 0o644)
    with AsUser(call.req):
        if call.req.get("parents"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        existed = os.path.lexists(path)
        fd = os.open(path, opening, mode)
    try:
        require_regular(fd, path)
        if not existed:
            os.fchmod(fd, mode)  # exact: the umask is for programs
        if flags & os.O_TRUNC:
            os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


async def _write(call: Call) -> dict[str, object]:
    path = fields.path(call.req)
    offset = fields.number(call.req, "offset")
    append = call.req.get("disposition") == "append"
    fd = _open_for_writing(call, path)
    try:
        await call.send_json(Frame.EVENT, {"open": True})
        total = 0
        while True:
            kind, data = await call.recv(256 << 10)
            if kind == Frame.EOF:
                return {"bytes": total}
            if kind != Frame.DATA:
                raise CallError("INVALID", "only data may follow")
            view = memoryview(data)
            while view:
                size = os.write(fd, view) if append else os.pwrite(fd, view, offset + total)
                view = view[size:]
                total += size
            await reactor.checkpoint()
    finally:
        os.close(fd)


async def _stat(call: Call) -> dict[str, object]:
    path = fields.path(call.req)
    return describe(path, os.stat(path, follow_symlinks=call.req.get("follow") is not False))


async def _mkdir(call: Call) -> dict[str, object]:
    path, mode = fields.path(call.req), fields.mode(call.req, 0o755)
    with AsUser(call.req):
        if call.req.get("parents"):
            existed = os.path.isdir(path)
            os.makedirs(path, mode, exist_ok=True)
            if existed:
                return {}
        else:
            os.mkdir(path, mode)
        os.chmod(path, mode)
    return {}


async def _rename(call: Call) -> dict[str, object]:
    os.rename(fields.path(call.req), fields.path(call.req, "new_path"))
    return {}


async def _link(call: Call) -> dict[str, object]:
    os.link(fields.path(call.req), fields.path(call.req, "new_path"))
    return {}


async def _symlink(call: Call) -> dict[str, object]:
    target = call.req.get("target")
    if not isinstance(target, str) or not target or "\0" in target or len(target) > fields.MAX_PATH_BYTES:
        raise CallError("INVALID", "target must be a path without NUL")
    os.symlink(target, fields.path(call.req, "new_path"))
    return {}


async def _readlink(call: Call) -> dict[str, object]:
    return {"target": os.readlink(fields.path(call.req))}


async def _realpath(call: Call) -> dict[str, object]:
    return {"path": os.path.realpath(fields.path(call.req), strict=True)}


async def _chmod(call: Call) -> dict[str, object]:
    os.chmod(fields.path(call.req), fields.mode(call.req, 0))
    return {}


async def _chown(call: Call) -> dict[str, object]:
    uid, gid = (fields.optional_number(call.req, name, (1 << 32) - 2) for name in ("uid", "gid"))
    follow = call.req.get("follow") is not False
    os.chown(fields.path(call.req), -1 if uid is None else uid, -1 if gid is None else gid, follow_symlinks=follow)
    return {}


async def _utime(call: Call) -> dict[str, object]:
    import time

    times = [call.req.get(name) for name in ("atime_ns", "mtime_ns")]
    if not all(value is None or isinstance(value, int) for value in times):
        raise CallError("INVALID", "times must be nanoseconds since 1970")
    now = time.time_ns()
    atime, mtime = (value if isinstance(value, int) else now for value in times)
    os.utime(fields.path(call.req), ns=(atime, mtime))
    return {}


async def _truncate(call: Call) -> dict[str, object]:
    os.truncate(fields.path(call.req), fields.number(call.req, "size"))
    return {}


async def _mktemp(call: Call) -> dict[str, object]:
    directory = fields.path(call.req, "directory")
    prefix, suffix = str(call.req.get("prefix") or "tmp."), str(call.req.get("suffix") or "")
    if "/" in prefix + suffix or "\0" in prefix + suffix:
        raise CallError("INVALID", "prefix and suffix must not have a slash or NUL in them")
    with AsUser(call.req):
        for _ in range(_MAX_TEMP_TRIES):
            path = f"{directory}/{prefix}{os.urandom(6).hex()}{suffix}"
            try:
                if call.req.get("make_directory"):
                    os.mkdir(path, 0o700)
                else:
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            except FileExistsError:
                continue
            return {"path": path}
    raise CallError("EXISTS", f"{directory}: no free temporary name found")


OPS: dict[str, Handler] = {
    "fs.read": _read, "fs.write": _write, "fs.stat": _stat, "fs.mkdir": _mkdir, "fs.rename": _rename,
    "fs.link": _link, "fs.symlink": _symlink, "fs.readlink": _readlink, "fs.realpath": _realpath,
    "fs.chmod": _chmod, "fs.chown": _chown, "fs.utime": _utime, "fs.truncate": _truncate, "fs.mktemp": _mktemp,
    **TREE_OPS, **WATCH_OPS,
}  # fmt: skip
