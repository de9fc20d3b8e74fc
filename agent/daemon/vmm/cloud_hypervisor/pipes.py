"""FIFOs for a VMM's console, log and events: the VMM never blocks on them and never ends because of them.

Both ends are open for reading and writing and do not block (fifo(7)): the VMM gets no EPIPE while no agent runs, and a
full pipe drops output. The next agent opens the FIFOs again by path.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.common.errors import VmmError
from agent.daemon.vmm.rotating_log import RotatingLog

_READ_BYTES = 256 << 10
_MAX_EVENT_BYTES = 64 << 10
_PIPE_BYTES = 1 << 20
_FLAGS = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC


class Pipe:
    """Reads a FIFO, created if it is missing, and passes each piece to `on_data`."""

    def __init__(self, path: Path, on_data: Callable[[bytes], None]) -> None:
        self._path = path
        self._on_data = on_data
        if not path.exists():
            os.mkfifo(path, 0o600)
        self._fd = os.open(path, _FLAGS | os.O_NOFOLLOW)
        with contextlib.suppress(OSError):  # above fs.pipe-max-size: the default size will do
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._read)

    @contextlib.contextmanager
    def writer(self) -> Iterator[int]:
        """Yield a descriptor for the VMM to inherit; closed on exit."""
        fd = os.open(self._path, _FLAGS)
        try:
            yield fd
        finally:
            os.close(fd)

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return False
        self._on_data(data)
        return True

    def drain(self) -> None:
        """Read the present content, at most one full pipe."""
        for _ in range(16):
            if self._fd < 0 or not self._read():
                return

    def close(self) -> None:
        """Read the remaining content and close. Idempotent."""
        if self._fd >= 0:
            self.drain()
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


class Log:
    """Appends the content of a FIFO to a file of bounded size; see `RotatingLog`."""

    def __init__(self, pipe_path: Path, path: Path, limit_bytes: int = 1 << 20) -> None:
        self._log = RotatingLog(path, limit_bytes)
        self.pipe = Pipe(pipe_path, self._log.append)

    def tail(self, limit_bytes: int) -> bytes:
        """Return the last `limit_bytes` of output until now; works after the pipe was closed, too."""
        self.pipe.drain()
        return self._log.tail(limit_bytes)


class VmmEvents:
    """Events of the event monitor: JSON objects, each followed by an empty line (event_monitor/src/lib.rs).

    `recent` has the names of the last 64 events, such as "vm resumed".
    """

    def __init__(self, path: Path) -> None:
        self._buffer = b""
        self._waiters: list[tuple[str, asyncio.Future[None]]] = []
        self.recent: deque[str] = deque(maxlen=64)
        self.on_event: Callable[[str], None] | None = None
        self.pipe = Pipe(path, self._feed)

    def _feed(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\n\n")) >= 0:
            text, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
            with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
                event = json.loads(text)
                self._on_event(f"{event['source']} {event['event']}")
        if len(self._buffer) > _MAX_EVENT_BYTES:
            self._buffer = b""

    def _on_event(self, name: str) -> None:
        self.recent.append(name)
        for wanted, future in self._waiters:
            if wanted == name and not future.done():
                future.set_result(None)
        if self.on_event is not None:
            self.on_event(name)

    async def wait_for(self, name: str, timeout_s: float) -> None:
        """Wait until the event `name` ("vm resumed") has occurred, or return at once if it is recent.

        :raises VmmError: the event did not occur within `timeout_s`.
        """
        if name in self.recent:
            return
        entry = (name, asyncio.get_running_loop().create_future())
        self._waiters.append(entry)
        try:
            async with asyncio.timeout(timeout_s):
                await entry[1]
        except TimeoutError as error:
            raise VmmError(f"Cloud Hypervisor did not report {name!r} within {timeout_s:g} s") from error
        finally:
            self._waiters.remove(entry)
