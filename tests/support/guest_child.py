"""Starts tests/support/guest_server.py and talks to it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from agent.daemon.guestlink.channel import Channel
from agent.daemon.vmm import sockets
from guest.wire import Frame

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


class Guest:
    """A guest's server in a child process, behind a unix socket."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.process = process
        self.path = path

    @asynccontextmanager
    async def channel(self, *, fresh: bool = True) -> AsyncIterator[Channel]:
        """A link of one test; whoever connects next replaces it."""
        async with asyncio.timeout(10):
            channel = await Channel.open(await sockets.connect(self.path), fresh=fresh)
        try:
            yield channel
        finally:
            await channel.aclose()

    def rss_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def start(kind: str, sock: socket.socket, **environment: str) -> subprocess.Popen[bytes]:
    """Starts the server on `sock`, which the caller closes."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.guest_server", kind, str(sock.fileno())],
        cwd=ROOT, pass_fds=[sock.fileno()], env=os.environ | environment,
    )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the server; fails if it had ended by itself."""
    alive = process.poll() is None
    process.kill()
    process.wait()
    assert alive, f"the guest's server ended by itself: {process.returncode}"


@contextmanager
def guest(**environment: str) -> Iterator[Guest]:
    """A guest for a test or a module."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "guest.sock"
        with sockets.listen(path) as listener:
            process = start("listener", listener, **environment)
        try:
            yield Guest(process, path)
        finally:
            end(process)


Collected = tuple[dict[str, Any], dict[Frame, bytes], list[dict[str, Any]]]


async def collect(channel: Channel, op: str, /, send: bytes | None = None, **fields: object) -> Collected:
    """Makes a call to its end; returns result, bytes by kind of frame, and events."""
    data: dict[Frame, bytearray] = {}
    events: list[dict[str, Any]] = []
    async with channel.stream(op, **fields) as stream:

        async def feed() -> None:
            if send is not None:
                await stream.send(Frame.DATA, send)
                await stream.send_eof()

        feeder = asyncio.create_task(feed())
        try:
            while True:
                frame = await stream.recv()
                assert frame is not None
                kind, value = frame
                if kind is Frame.RESULT:
                    await feeder
                    return value, {key: bytes(text) for key, text in data.items()}, events
                if kind is Frame.EVENT:
                    events.append(value)
                else:
                    data.setdefault(kind, bytearray()).extend(value)
        finally:
            feeder.cancel()
