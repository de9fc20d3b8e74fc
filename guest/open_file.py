"""Serve fs.open: a file that stays open as long as the call, with a position and locks.

After the first answer, {"open": true, "info": ...}, each EVENT frame of the host is an operation, {"do": name, ...}.
It gets one EVENT frame as its answer, in order: the result, or {"error": {"message", "errno"}}. "size" of a "write",
and of the answer to a "read", is the number of bytes that follow in DATA frames.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from guest import params, reactor
from guest.call import Call, os_error
from guest.file_tree import describe, require_regular
from guest.params import AsUser
from guest.wire import CallError, Frame, parse_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.call import Handler

MAX_IO_BYTES = 1 << 20
_FIRST_RETRY_S, _LAST_RETRY_S = 0.005, 0.1  # between two attempts to lock


def _open(call: Call, path: str) -> int:
    req = call.req
    append, create_new = bool(req.get("append")), bool(req.get("create_new"))
    write = append or bool(req.get("write"))
    create = create_new or bool(req.get("create"))
    if not (write or req.get("read")) or ((create or req.get("truncate")) and not write):
        raise CallError("INVALID", "open a file to read, write or append; create and truncate need write or append")
    flags = os.O_RDWR if write and req.get("read") else os.O_WRONLY if write else os.O_RDONLY
    flags |= (append and os.O_APPEND) | (create and os.O_CREAT) | (create_new and os.O_EXCL)
    mask = os.umask(0)  # the file gets exactly the requested mode
    try:
        with AsUser(req):
            fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, params.mode(req, 0o644))
    finally:
        os.umask(mask)
    try:
        if write or not stat.S_ISDIR(os.fstat(fd).st_mode):
            require_regular(fd, path)
        if req.get("truncate") and not create_new:
            os.ftruncate(fd, 0)  # not before it is known to be a regular file
    except BaseException:
        os.close(fd)
        raise
    return fd


async def _write(call: Call, fd: int, size: int) -> dict[str, object]:
    """Write the `size` bytes of data that follow; receive all of them even after an error."""
    failure: OSError | None = None
    left, written = size, 0
    while left:
        kind, data = await call.recv(min(left, 256 << 10))
        if kind != Frame.DATA:
            raise CallError("INVALID", f"a write lacks {left} of its bytes")
        left -= len(data)
        view = memoryview(data)
        while view and failure is None:
            try:
                done = os.write(fd, view)
            except OSError as error:
                failure = error
                break
            view = view[done:]
            written += done
        await reactor.checkpoint()
    if failure is not None and not written:
        raise failure
    return {"written": written}


async def _lock(fd: int, *, exclusive: bool) -> dict[str, object]:
    kind = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB
    pause_s = _FIRST_RETRY_S
    while True:
        try:
            fcntl.flock(fd, kind)
        except BlockingIOError:
            await reactor.sleep(pause_s)  # not a blocking flock(2): PID 1 has one thread
            pause_s = min(pause_s * 2, _LAST_RETRY_S)
        else:
            return {}


async def _do(call: Call, fd: int, path: str, message: dict[str, object]) -> dict[str, object]:
    match message.get("do"):
        case "write":
            return await _write(call, fd, params.number(message, "size", MAX_IO_BYTES))
        case "seek":
            offset, whence = message.get("offset"), params.number(message, "whence", 2)
            if not isinstance(offset, int):
                raise CallError("INVALID", "offset must be a number")
            return {"position": os.lseek(fd, offset, whence)}
        case "stat":
            return describe(path, os.fstat(fd))
        case "truncate":
            os.ftruncate(fd, params.number(message, "size"))
        case "sync":
            (os.fdatasync if message.get("data_only") else os.fsync)(fd)
        case "lock":
            return await _lock(fd, exclusive=bool(message.get("exclusive")))
        case "unlock":
            fcntl.flock(fd, fcntl.LOCK_UN)
        case "utime":
            os.utime(fd, ns=params.times(message))
        case _:
            raise CallError("INVALID", "unknown operation on an open file")
    return {}


async def _serve(call: Call) -> dict[str, object]:
    path = params.path(call.req)
    fd = _open(call, path)
    try:
        await call.send_json(Frame.EVENT, {"open": True, "info": describe(path, os.fstat(fd))})
        while True:
            kind, payload = await call.recv()
            if kind == Frame.EOF:
                return {}
            if kind != Frame.EVENT:
                raise CallError("INVALID", "data frames may only follow a write")
            message = parse_json(payload)
            data = b""
            try:
                if message.get("do") == "read":
                    data = os.read(fd, max(1, params.number(message, "size", MAX_IO_BYTES)))
                    answer: dict[str, object] = {"size": len(data)}
                else:
                    answer = await _do(call, fd, path, message)
            except (OSError, OverflowError) as error:
                known = error if isinstance(error, OSError) else OSError(errno.EINVAL, os.strerror(errno.EINVAL))
                failed = os_error(known, path)
                answer = {"error": {"message": failed.message, "errno": failed.errno}}
            await call.send_json(Frame.EVENT, answer)
            await call.send(Frame.DATA, data)
    finally:
        os.close(fd)


OPS: dict[str, Handler] = {"fs.open": _serve}
