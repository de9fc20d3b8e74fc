"""Standard streams inside the event loop: never blocked for others, never buffered without bound.

The descriptors stay as they are: O_NONBLOCK would be seen by every process that shares the terminal or pipe.
"""

from __future__ import annotations

import asyncio
import errno
import os

CHUNK_BYTES = 64 << 10
# What is writable to poll(2) takes this much without blocking (PIPE_BUF, pipe(7)).
_SAFE_BYTES = 4096


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


async def read(fd: int, limit: int = CHUNK_BYTES) -> bytes:
    """Returns the next bytes of a descriptor, b"" at its end; a terminal that hangs up is at its end."""
    loop = asyncio.get_running_loop()
    while True:
        ready = loop.create_future()
        try:
            loop.add_reader(fd, _wake, ready)
        except PermissionError:  # epoll(7) takes no regular files; those do not keep anyone waiting for long
            return await asyncio.to_thread(os.read, fd, limit)
        try:
            await ready
        finally:
            loop.remove_reader(fd)
        try:
            return os.read(fd, limit)
        except BlockingIOError:
            continue  # someone else took it
        except OSError as error:
            if error.errno == errno.EIO:
                return b""
            raise


class Output:
    """A descriptor to write to."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pollable = True

    async def write(self, data: bytes) -> None:
        """Returns when all is written. :raises BrokenPipeError: nobody reads."""
        view = memoryview(data)
        while view:
            await self._writable()
            try:
                view = view[os.write(self._fd, view[:_SAFE_BYTES] if self._pollable else view) :]
            except BlockingIOError:
                continue

    async def _writable(self) -> None:
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
