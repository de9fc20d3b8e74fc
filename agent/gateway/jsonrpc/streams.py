"""Byte streams of one connection: `InboundStream` is written by the client, `OutboundStream` is read by it.

The protocol has no flow control. Inbound bytes are buffered until they are read, on disk if necessary; a client that
does not read outbound bytes blocks their writer through the socket.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import tempfile
from collections import deque
from collections.abc import Callable
from typing import IO

from agent.gateway.errors import CallError
from agent.gateway.jsonrpc.messages import Send, stream_notification

CHUNK_BYTES = 64 << 10
_READ_BYTES = 4 * CHUNK_BYTES
_MEMORY_BYTES = 1 << 20
# The JavaScript SDK has one table of streams for all sandboxes of its process, which may be on several gateways.
_ids = itertools.count(secrets.randbits(48))


class InboundStream:
    """Stream that the client writes. Bytes beyond 1 MiB wait in an unnamed temporary file.

    :param on_buffered: called with the change of the number of bytes in the file.
    """

    def __init__(self, on_buffered: Callable[[int], None] = lambda _change: None) -> None:
        self._on_buffered = on_buffered
        self._chunks: deque[bytes] = deque()
        self._memory_bytes = 0
        self._file: IO[bytes] | None = None
        self._written = self._read = 0  # positions in the file
        self._changed = asyncio.Event()
        self._ended = False
        self._error: CallError | None = None
        self._discarded = False

    def feed(self, data: bytes) -> None:
        """Append bytes from the client.

        :raises OSError: the disk is full.
        """
        if self._ended or self._discarded or not data:
            return
        if self._written == self._read and self._memory_bytes + len(data) <= _MEMORY_BYTES:
            self._chunks.append(data)
            self._memory_bytes += len(data)
        else:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  lives as long as the stream
            self._file.seek(self._written)
            self._written += self._file.write(data)
            self._on_buffered(len(data))
        self._changed.set()

    def end(self, error: CallError | None = None) -> None:
        """Mark the end of the stream; readers get the first error, after the bytes before it."""
        self._ended = True
        self._error = self._error or error
        self._changed.set()

    async def read(self) -> bytes:
        """Return the next bytes, or b"" at the end.

        :raises CallError: the client ended the stream with an error, or disconnected.
        """
        while True:
            if self._chunks:
                data = self._chunks.popleft()
                self._memory_bytes -= len(data)
                return data
            if self._file is not None and self._read < self._written:
                return self._read_file(self._file)
            if self._error is not None:
                raise self._error
            if self._ended or self._discarded:
                return b""
            self._changed.clear()
            await self._changed.wait()

    def _read_file(self, file: IO[bytes]) -> bytes:
        file.seek(self._read)
        data = file.read(min(_READ_BYTES, self._written - self._read))
        self._read += len(data)
        self._on_buffered(-len(data))
        if self._read == self._written:
            file.truncate(0)
            self._read = self._written = 0
        return data

    @property
    def ended(self) -> bool:
        """Whether the client has ended the stream."""
        return self._ended

    def discard(self) -> None:
        """Drop the buffered bytes and all later ones. Idempotent."""
        self._discarded = True
        self._chunks.clear()
        self._memory_bytes = 0
        if self._file is not None:
            self._on_buffered(self._read - self._written)
            self._file.close()
            self._file = None
        self._read = self._written = 0
        self._changed.set()


class OutboundStream:
    """Stream that the client reads. After a cancel nothing is sent for it: the JavaScript SDK would end its process.

    :param call_answered: set once the client has been sent the stream's id. The JavaScript SDK puts earlier events into
        a placeholder stream that throws if it is cancelled without a reason, and ends the process at the stream's end.
    :param ends_after_error: send an end after an error; the Python SDK waits for ever without it.
    """

    def __init__(self, send: Send, call_answered: asyncio.Event, *, ends_after_error: bool = False) -> None:
        self.id = next(_ids)
        self._send = send
        self._call_answered = call_answered
        self._ends_after_error = ends_after_error
        self._started = False
        self.open = True

    async def _notify(self, event: str, **params: object) -> None:
        if not self._started:
            self._started = True
            await self._call_answered.wait()
            await self._send(stream_notification("start", self.id))
        if self.open:
            await self._send(stream_notification(event, self.id, **params))

    async def write(self, data: bytes) -> None:
        """Send bytes in chunks, nothing for b""; wait while the client does not read its socket."""
        for start in range(0, len(data), CHUNK_BYTES):
            if self.open:
                await self._notify("enqueue", data=data[start : start + CHUNK_BYTES])

    async def write_chunk(self, data: bytes) -> None:
        """Send bytes as one chunk."""
        await self._notify("enqueue", data=data)

    async def end(self) -> None:
        """End the stream. Idempotent."""
        if self.open:
            await self._notify("end")
            self.open = False

    async def fail(self, error: CallError) -> None:
        """End the stream with an error. Idempotent."""
        if self.open:
            await self._notify("error", error=error.to_json())
            if self._ends_after_error:
                await self._notify("end")
            self.open = False

    def cancel(self) -> None:
        """Stop sending: the client cancelled the stream, or disconnected. Idempotent."""
        self.open = False
