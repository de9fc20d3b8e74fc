"""Serial console of a QEMU VM, logged to `console.log` (`RotatingLog`).

QEMU offers the console as a socket and drops output while no client reads, so a dead agent never stops a guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

from agent.common.aio import cancel_and_wait
from agent.daemon.vmm.rotating_log import RotatingLog

_READ_BYTES = 64 << 10


class Console:
    """Logs one console socket until the VMM closes it; `grown` is set whenever output has arrived.

    :raises OSError: there is no such directory.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        directory.stat()
        self._log = RotatingLog(directory / "console.log", limit_bytes)
        self._log.create()
        self._task: asyncio.Task[None] | None = None
        self.grown = asyncio.Event()

    def attach(self, sock: socket.socket) -> None:
        """Start to log a connected, non-blocking socket; the console owns and closes it."""
        self._task = asyncio.create_task(self._read(sock))

    async def _read(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with sock, contextlib.suppress(OSError):  # of the socket; those of the log end no reading
            while data := await loop.sock_recv(sock, _READ_BYTES):
                self._log.append(data)
                self.grown.set()

    def tail(self, limit_bytes: int) -> bytes:
        """Return the last `limit_bytes` of output; works after `aclose`, too."""
        return self._log.tail(limit_bytes)

    async def aclose(self, timeout_s: float = 1.0) -> None:
        """Log the remaining output of a VMM that has ended, for up to `timeout_s`. Idempotent."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=timeout_s)
            await cancel_and_wait(self._task)
