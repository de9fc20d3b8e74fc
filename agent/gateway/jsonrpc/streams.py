"""Byte streams of one connection: those that the client writes, and those that it reads. There is no flow control in
the protocol: what the client sends is kept until it is wanted, on the disk if need be; what it does not read stops the
writer through the socket.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable
from typing import IO

from agent.gateway.errors import Failure

CHUNK_BYTES = 64 << 10
_IN_MEMORY_BYTES = 1 << 20
# The JavaScript SDK has one table of streams for all sandboxes of its process, and they may be on several gateways.
_ids = itertools.count(secrets.randbits(48))

Send = Callable[[object], Awaitable[None]]


def notification(method: str, **params: object) -> dict[str, object]:
    """Returns a message that expects no answer."""
    return {"jsonrpc": "2.0", "method": method, "params": params}


class Inbound:
    """A stream that the client writes. What does not fit into memory waits in a file that has no name.

    :param on_buffered: called with the change of bytes that wait on the disk.
    """

    def __init__(self, on_buffered: Callable[[int], None] = lambda _change: None) -> None:
        self._on_buffered = on_buffered
        self._chunks: deque[bytes] = deque()
        self._in_memory = 0
        self._file: IO[bytes] | None = None
        self._written = self._read = 0  # positions in the file
        self._changed = asyncio.Event()
        self._over = False
        self._failure: Failure | None = None
        self._discarded = False

    def feed(self, data: bytes) -> None:
        """Takes what the client sent. :raises OSError: the disk is full."""
        if self._over or self._discarded or not data:
            return
        if self._written == self._read and self._in_memory + len(data) <= _IN_MEMORY_BYTES:
            self._chunks.append(data)
            self._in_memory += len(data)
        else:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  lives as long as the stream
            self._file.seek(self._written)
            self._written += self._file.write(data)
            self._on_buffered(len(data))
        self._changed.set()

    def end(self, failure: Failure | None = None) -> None:
        """Takes the end, or the failure, of the stream."""
        self._over = True
        self._failure = self._failure or failure
        self._changed.set()

    async def read(self) -> bytes:
        """Returns the next bytes; b"" at the end. :raises Failure: the client gave the stream up."""
        while True:
            if self._chunks:
                data = self._chunks.popleft()
                self._in_memory -= len(data)
                return data
            if self._file is not None and self._read < self._written:
                self._file.seek(self._read)
                data = self._file.read(min(CHUNK_BYTES * 4, self._written - self._read))
                self._read += len(data)
                self._on_buffered(-len(data))
                if self._read == self._written:
                    self._file.truncate(0)
                    self._read = self._written = 0
                return data
            if self._failure is not None:
                raise self._failure
            if self._over or self._discarded:
                return b""
            self._changed.clear()
            await self._changed.wait()

    @property
    def over(self) -> bool:
        """Whether the client has ended it."""
        return self._over

    def discard(self) -> None:
        """Forgets what waits, and what is still to come. Idempotent."""
        self._discarded = True
        self._chunks.clear()
        self._in_memory = 0
        if self._file is not None:
            self._on_buffered(self._read - self._written)
            self._file.close()
            self._file = None
        self._read = self._written = 0
        self._changed.set()


class Outbound:
    """A stream that the client reads. After a cancel nothing is sent for it: the JavaScript SDK would end its process.

    :param announced: set once the client has been told of the stream. What the JavaScript SDK hears earlier it keeps
        in a stream that throws when it is cancelled without a reason, and then ends the process at the stream's end.
    :param ends_after_error: an error is followed by an end, without which the Python SDK waits for ever.
    """

    def __init__(self, send: Send, announced: asyncio.Event, *, ends_after_error: bool = False) -> None:
        self.id = next(_ids)
        self._send = send
        self._announced = announced
        self._ends_after_error = ends_after_error
        self._started = False
        self.open = True

    async def _notify(self, method: str, **params: object) -> None:
        if not self._started:
            self._started = True
            await self._announced.wait()
            await self._send(notification("$sandbox.stream.start", streamId=self.id))
        if self.open:
            await self._send(notification(f"$sandbox.stream.{method}", streamId=self.id, **params))

    async def write(self, data: bytes) -> None:
        """Sends bytes, if any, in chunks; waits while the client does not read its socket."""
        for start in range(0, len(data), CHUNK_BYTES):
            if self.open:
                await self._notify("enqueue", data=data[start : start + CHUNK_BYTES])

    async def write_whole(self, data: bytes) -> None:
        """Sends bytes, at least one, as one chunk."""
        await self._notify("enqueue", data=data)

    async def end(self) -> None:
        """Ends the stream. Idempotent."""
        if self.open:
            await self._notify("end")
            self.open = False

    async def fail(self, failure: Failure) -> None:
        """Ends the stream with an error. Idempotent."""
        if self.open:
            await self._notify("error", error=failure.to_json())
            if self._ends_after_error:
                await self._notify("end")
            self.open = False

    def cancel(self) -> None:
        """The client wants no more."""
        self.open = False
