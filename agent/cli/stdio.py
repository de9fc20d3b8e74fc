"""Asynchronous reads and writes of the standard streams, without blocking the event loop or buffering without bound.

The descriptors stay in blocking mode: O_NONBLOCK would change them for every process that shares the terminal or pipe.
"""

from __future__ import annotations

import asyncio
import errno
import os

CHUNK_BYTES = 64 << 10
# A descriptor that poll(2) reports as writable takes this much without blocking (PIPE_BUF, pipe(7)).
_SAFE_BYTES = 4096


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


async def read(fd: int, limit: int = CHUNK_BYTES) -> bytes:
    """Return the next bytes of a descriptor, or b"" at its end or when its terminal has hung up."""
    loop = asyncio.get_running_loop()
    while True:
        ready = loop.create_future()
        try:
            loop.add_reader(fd, _wake, ready)
        except PermissionError:  # epoll(7) rejects regular files, whose reads return soon
            return await asyncio.to_thread(os.read, fd, limit)
        try:
            await ready
        finally:
            loop.remove_reader(fd)
        try:
            return os.read(fd, limit)
        except BlockingIOError:
            continue  # another process has read the bytes
        except OSError as error:
            if error.errno == errno.EIO:
                return b""
            raise


class Writer:
    """Writes to a descriptor that may be slow."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pollable = True

    async def write(self, data: bytes) -> None:
        """Write all of `data`.

        :raises BrokenPipeError: the reader of the pipe has closed it.
        """
        view = memoryview(data)
        while view:
            await self._wait_writable()
            try:
                view = view[os.write(self._fd, view[:_SAFE_BYTES] if self._pollable else view) :]
            except BlockingIOError:
                continue

    async def _wait_writable(self) -> None:
        if not self._pollable:
            return
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        try:
            loop.add_writer(self._fd, _wake, ready)
        except PermissionError:  # a regular file
            self._pollable = False
            return
        try:
            await ready
        finally:
            loop.remove_writer(self._fd)
