"""Serial console of a QEMU VM, logged to two files of bounded size: a guest must not fill the host's disk.

QEMU offers the console as a socket and drops output while no client reads, so a dead agent never stops a guest. The
agent appends the output to `console.log`; at half of the limit that file replaces `console.log.1`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path

_READ_BYTES = 64 << 10


def read_tail(newest_first: Sequence[Path], limit_bytes: int) -> bytes:
    """Return the last `limit_bytes` of files that continue each other; a missing file counts as empty."""
    kept = b""
    for path in newest_first:
        with contextlib.suppress(OSError), path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (limit_bytes - len(kept))))
            kept = file.read() + kept
        if len(kept) >= limit_bytes:
            break
    return kept[-limit_bytes:] if limit_bytes else b""


class Console:
    """Logs one console socket until the VMM closes it; `grown` is set whenever output was appended."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._path = directory / "console.log"
        self._old_path = directory / "console.log.1"
        self._half_bytes = max(limit_bytes // 2, 1)
        self._file = self._path.open("ab", buffering=0)
        self._size = self._file.tell()
        self._task: asyncio.Task[None] | None = None
        self.grown = asyncio.Event()

    def attach(self, sock: socket.socket) -> None:
        """Start to log a connected, non-blocking socket; the console owns and closes it."""
        self._task = asyncio.create_task(self._read(sock))

    async def _read(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with sock, contextlib.suppress(OSError):
            while data := await loop.sock_recv(sock, _READ_BYTES):
                self._append(data)

    def _append(self, data: bytes) -> None:
        data = data[-2 * self._half_bytes :]
        for start in range(0, len(data), self._half_bytes):
            self._append_piece(data[start : start + self._half_bytes])
        self.grown.set()

    def _append_piece(self, data: bytes) -> None:
        if self._size + len(data) > self._half_bytes:
            self._file.close()
            self._path.replace(self._old_path)
            self._file = self._path.open("ab", buffering=0)
            self._size = 0
        self._file.write(data)
        self._size += len(data)

    def tail(self, limit_bytes: int) -> bytes:
        """Return the last `limit_bytes` of output; works after `aclose`, too."""
        return read_tail((self._path, self._old_path), limit_bytes)

    async def aclose(self, timeout_s: float = 1.0) -> None:
        """Log the remaining output of a VMM that has ended, for up to `timeout_s`, then close the file. Idempotent."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=timeout_s)
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._file.close()
