"""The raw rate of a running VM's link: one more port on its virtio-serial device, with nothing but bytes on it.

The port is plugged in through the VMM's control socket, and so is the descriptor of its host's end: a VMM sees no
directory in which it could make a socket. In the guest a Python loop, like the guest's init but without
processes, calls and frames, reads or writes it; on the host a Python loop does the other half.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.tools.bench.harness import Target
from tests.tools.bench.qmp import Qmp

_NAME = "bench"
_BLOCK_BYTES = 256 << 10
_TIMEOUT_S = 60.0
_FIND = f"""
import os
ports = "/sys/class/virtio-ports"
name = next(n for n in os.listdir(ports) if open(f"{{ports}}/{{n}}/name").read().strip() == "{_NAME}")
port = os.open(f"/dev/{{name}}", os.O_RDWR)
os.write(port, b"!")
"""
# 32 KiB is the largest write, and a page the largest read, that the driver takes at once.
_WRITE = _FIND + "block = bytes(32 << 10)\nfor _ in range(SIZE // len(block)): os.write(port, block)\n"
# The least that a process's output costs on its way to the link: a pipe, and no copy in user space (splice(2)).
_PIPE = (
    _FIND
    + """
import fcntl, select, subprocess
output, theirs = os.pipe()
fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, 1 << 20)
child = subprocess.Popen(["dd", "if=/dev/zero", "bs=256k", "count=" + str(SIZE >> 18), "status=none"], stdout=theirs)
os.close(theirs)
left = SIZE
while left:
    select.select([output], [], [])
    left -= os.splice(output, port, left)
child.wait()
"""
)
_READ = (
    _FIND
    + "block = bytearray(64 << 10)\nleft = SIZE\nwhile left: left -= os.readv(port, [block])\nos.write(port, b'!')"
)
# The same for standard input: nothing but a loop between the link and a pipe. A port cannot be spliced from.
_FEED = (
    _FIND
    + """
import fcntl, subprocess
theirs, feed = os.pipe()
fcntl.fcntl(feed, fcntl.F_SETPIPE_SZ, 1 << 20)
child = subprocess.Popen(["dd", "of=/dev/null", "bs=256k", "status=none"], stdin=theirs)
os.close(theirs)
block = memoryview(bytearray(128 << 10))
pages = [block[start : start + 4096] for start in range(0, len(block), 4096)]
left = SIZE
while left:
    size = os.readv(port, pages)
    os.write(feed, block[:size])
    left -= size
os.close(feed)
child.wait()
os.write(port, b"!")
"""
)


class RawPort:
    """The host's end of the port."""

    def __init__(self, target: Target, sock: socket.socket) -> None:
        self._target = target
        self._sock = sock

    async def _run(self, code: str, size_bytes: int, move: object) -> float:
        running = asyncio.create_task(
            self._target.client.run(
                self._target.id, "python3", "-I", "-c", code.replace("SIZE", str(size_bytes)), user="root"
            )
        )
        assert callable(move)
        try:
            seconds: float = await asyncio.to_thread(move, size_bytes)
        finally:
            result = await running
        if result.code:
            raise SystemExit(result.stderr.decode())
        return size_bytes / (1 << 20) / seconds

    async def from_guest(self, size_bytes: int) -> float:
        """Returns MiB/s of bytes that the guest writes."""
        return await self._run(_WRITE, size_bytes, self._receive)

    async def from_pipe(self, size_bytes: int) -> float:
        """Returns MiB/s of the output of a process in the guest."""
        return await self._run(_PIPE, size_bytes, self._receive)

    async def to_guest(self, size_bytes: int) -> float:
        """Returns MiB/s of bytes that the guest reads."""
        return await self._run(_READ, size_bytes, self._send)

    async def to_pipe(self, size_bytes: int) -> float:
        """Returns MiB/s of the input of a process in the guest."""
        return await self._run(_FEED, size_bytes, self._send)

    def _receive(self, size_bytes: int) -> float:
        block = bytearray(_BLOCK_BYTES)
        self._expect_mark()
        start = time.perf_counter()
        left = size_bytes
        while left:
            left -= self._sock.recv_into(block, min(left, _BLOCK_BYTES))
        return time.perf_counter() - start

    def _send(self, size_bytes: int) -> float:
        block = bytes(_BLOCK_BYTES)
        self._expect_mark()
        start = time.perf_counter()
        for _ in range(size_bytes // _BLOCK_BYTES):
            self._sock.sendall(block)
        self._expect_mark()
        return time.perf_counter() - start

    def _expect_mark(self) -> None:
        if self._sock.recv(1) != b"!":
            raise SystemExit("the guest's end of the raw port failed")


def _plug_in(qmp_path: str, guests_end: int) -> None:
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(_TIMEOUT_S)
        control.connect(qmp_path)
        qmp = Qmp(control)
        qmp.pass_fd(_NAME, guests_end)
        address = {"type": "fd", "data": {"str": _NAME}}
        qmp.execute("chardev-add", id=_NAME, backend={"type": "socket", "data": {"addr": address, "server": False}})
        qmp.execute("device_add", driver="virtserialport", chardev=_NAME, name=_NAME, id=_NAME)


@asynccontextmanager
async def raw_port(target: Target) -> AsyncIterator[RawPort]:
    """Plug the port in; it goes with the VM."""
    ours, guests = socket.socketpair()
    with ours:
        with guests:
            await asyncio.to_thread(_plug_in, str(target.run_dir / "qmp.sock"), guests.fileno())
        ours.settimeout(_TIMEOUT_S)
        yield RawPort(target, ours)
