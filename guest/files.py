"""Serve operations on single files: fs.read, fs.write, fs.stat, fs.mkdir, fs.rename, fs.link and so on."""

from __future__ import annotations

import os

from guest import params, reactor
from guest.call import CHUNK_BYTES, HEADROOM, Call
from guest.file_tree import OPS as TREE_OPS
from guest.file_tree import describe, require_regular
from guest.open_file import OPS as OPEN_FILE_OPS
from guest.params import AsUser
from guest.watch import OPS as WATCH_OPS
from guest.wire import CallError, Frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.call import Handler

_TURN_BYTES = 1 << 20  # yields to other calls after this many bytes
_MAX_TEMP_TRIES = 100


async def _read(call: Call) -> dict[str, object]:
    path = params.path(call.req)
    offset, length = params.number(call.req, "offset"), params.number(call.req, "length")
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
    # Truncated later, once the file is known to be regular.
    opening = flags & ~os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    mode = params.mode(call.req, 0o644)
    with AsUser(call.req):
        if call.req.get("parents"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        existed = os.path.lexists(path)
        fd = os.open(path, opening, mode)
    try:
        require_regular(fd, path)
        if not existed:
            os.fchmod(fd, mode)  # the requested mode, whatever the umask
        if flags & os.O_TRUNC:
            os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


async def _write(call: Call) -> dict[str, object]:
    path = params.path(call.req)
    offset = params.number(call.req, "offset")
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
                raise CallError("INVALID", "only data frames may follow the request")
            view = memoryview(data)
            while view:
                size = os.write(fd, view) if append else os.pwrite(fd, view, offset + total)
                view = view[size:]
                total += size
            await reactor.checkpoint()
    finally:
        os.close(fd)


async def _stat(call: Call) -> dict[str, object]:
    path = params.path(call.req)
    with AsUser(call.req):
        return describe(path, os.stat(path, follow_symlinks=call.req.get("follow") is not False))


async def _mkdir(call: Call) -> dict[str, object]:
    path, mode = params.path(call.req), params.mode(call.req, 0o755)
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
    old, new = params.path(call.req), params.path(call.req, "new_path")
    with AsUser(call.req):
        os.rename(old, new)
    return {}


async def _link(call: Call) -> dict[str, object]:
    old, new = params.path(call.req), params.path(call.req, "new_path")
    with AsUser(call.req):
        os.link(old, new)
    return {}


async def _symlink(call: Call) -> dict[str, object]:
    target = call.req.get("target")
    if not isinstance(target, str) or not target or "\0" in target or len(target) > params.MAX_PATH_BYTES:
        raise CallError("INVALID", "target must be a path without NUL")
    path = params.path(call.req, "new_path")
    with AsUser(call.req):
        os.symlink(target, path)
    return {}


async def _readlink(call: Call) -> dict[str, object]:
    path = params.path(call.req)
    with AsUser(call.req):
        return {"target": os.readlink(path)}


async def _realpath(call: Call) -> dict[str, object]:
    path = params.path(call.req)
    with AsUser(call.req):
        return {"path": os.path.realpath(path, strict=True)}


async def _chmod(call: Call) -> dict[str, object]:
    path, mode = params.path(call.req), params.mode(call.req, 0)
    with AsUser(call.req):
        os.chmod(path, mode)
    return {}


async def _chown(call: Call) -> dict[str, object]:
    uid, gid = (params.optional_number(call.req, name, (1 << 32) - 2) for name in ("uid", "gid"))
    path, follow = params.path(call.req), call.req.get("follow") is not False
    with AsUser(call.req):
        os.chown(path, -1 if uid is None else uid, -1 if gid is None else gid, follow_symlinks=follow)
    return {}


async def _utime(call: Call) -> dict[str, object]:
    path, times = params.path(call.req), params.times(call.req)
    with AsUser(call.req):
        os.utime(path, ns=times)
    return {}


async def _truncate(call: Call) -> dict[str, object]:
    path, size = params.path(call.req), params.number(call.req, "size")
    with AsUser(call.req):
        os.truncate(path, size)
    return {}


async def _mktemp(call: Call) -> dict[str, object]:
    directory = params.path(call.req, "directory")
    prefix, suffix = str(call.req.get("prefix") or "tmp."), str(call.req.get("suffix") or "")
    if "/" in prefix + suffix or "\0" in prefix + suffix:
        raise CallError("INVALID", "prefix and suffix must not contain a slash or NUL")
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
    raise CallError("EXISTS", f"{directory}: no unused temporary name found")


OPS: dict[str, Handler] = {
    "fs.read": _read, "fs.write": _write, "fs.stat": _stat, "fs.mkdir": _mkdir, "fs.rename": _rename,
    "fs.link": _link, "fs.symlink": _symlink, "fs.readlink": _readlink, "fs.realpath": _realpath,
    "fs.chmod": _chmod, "fs.chown": _chown, "fs.utime": _utime, "fs.truncate": _truncate, "fs.mktemp": _mktemp,
    **OPEN_FILE_OPS, **TREE_OPS, **WATCH_OPS,
}  # fmt: skip
