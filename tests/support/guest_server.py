"""The guest's server as a process of this host, for tests without a VM: real handlers, and a few that only tests have.

python -m tests.support.guest_server listener FD   connections of a listening socket, the newest one
python -m tests.support.guest_server port FD   one descriptor that hosts come to and go from, as a virtio-serial port
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys

from guest import link, reactor
from guest.call import Call, CallAbandoned
from guest.dial import OPS as DIAL_OPS
from guest.files import OPS as FILE_OPS
from guest.oom import OomWatcher
from guest.process import ProcessRegistry
from guest.process_ops import ProcessOps
from guest.stats import OPS as STATS_OPS
from guest.wire import CallError, Frame

_PR_SET_CHILD_SUBREAPER = 36
counts = {"running": 0, "abandoned": 0}
opened = reactor.Waiters()


async def _echo(call: Call) -> dict[str, object]:
    """Sends back what it gets, and says how much that was."""
    total = 0
    while True:
        kind, data = await call.recv()
        if kind == Frame.EOF:
            await call.send_eof()
            return {"bytes": total, "text": call.req.get("text")}
        total += len(data)
        await call.send(kind, data)


async def _sink(call: Call) -> dict[str, object]:
    """Reads everything; with `hold`, only once somebody calls test.open."""
    total = 0
    if call.req.get("hold"):
        await opened.wait()
    while True:
        kind, data = await call.recv()
        if kind == Frame.EOF:
            return {"bytes": total}
        total += len(data)


async def _open(_call: Call) -> dict[str, object]:
    opened.wake()
    return {}


async def _source(call: Call) -> dict[str, object]:
    """Sends `bytes` bytes that count up."""
    left = int(str(call.req.get("bytes")))
    chunk = bytes(range(256)) * 256
    while left:
        await call.send(Frame.STDOUT, chunk[: min(left, len(chunk))])
        left -= min(left, len(chunk))
    return {}


async def _fail(call: Call) -> dict[str, object]:
    kind = call.req.get("kind")
    if kind == "os":
        raise OSError(int(str(call.req.get("errno"))), "as asked", "/some/path")
    if kind == "value":
        raise ValueError("as asked")
    if kind == "bug":
        raise RuntimeError("as asked: a bug in a handler")
    raise CallError(str(call.req.get("code")), "as asked", str(call.req.get("errno") or ""))


async def _hang(_call: Call) -> dict[str, object]:
    counts["running"] += 1
    try:
        await reactor.Waiters().wait()
    except CallAbandoned:
        counts["abandoned"] += 1
        raise
    finally:
        counts["running"] -= 1
    return {}


async def _counts(_call: Call) -> dict[str, object]:
    return {**counts, "descriptors": len(os.listdir("/proc/self/fd"))}


async def _result(call: Call) -> dict[str, object]:
    return {"text": "x" * int(str(call.req.get("size")))}


TEST_OPS: dict[str, link.Handler] = {  # type: ignore[name-defined]
    "test.echo": _echo, "test.sink": _sink, "test.open": _open, "test.source": _source, "test.fail": _fail,
    "test.hang": _hang, "test.counts": _counts, "test.result": _result,
}  # fmt: skip


def main(kind: str, fd: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans come to us, as they come to PID 1
    os.umask(0o022)
    os.set_inheritable(fd, False)
    registry = ProcessRegistry(OomWatcher(os.environ.get("TEST_KMSG", "/dev/null")))
    processes = ProcessOps(registry)
    processes.ready = True
    handlers = {**processes.handlers(), **FILE_OPS, **DIAL_OPS, **STATS_OPS, **TEST_OPS}
    reactor.spawn(registry.reap())
    if kind == "listener":
        listener = socket.socket(fileno=fd)
        listener.setblocking(False)
        reactor.spawn(link.serve_listener(listener, handlers))
    else:
        os.set_blocking(fd, False)
        reactor.spawn(link.Link(fd, handlers, hang_up_is_final=False).serve())
    reactor.run_until(lambda: False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
