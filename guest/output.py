"""Output of a process: a log with a size limit, which any number of readers follow.

A reader that is attached loses nothing: the process is blocked while the slowest reader is too far behind
(`wait_for_room`). Without readers the oldest bytes are dropped, so that the process never blocks.
"""

from __future__ import annotations

import os
from collections import deque

from guest.call import CHUNK_BYTES, HEADROOM, Call
from guest.reactor import Waiters

# (frame type, buffer that begins with HEADROOM unused bytes, number of bytes after these)
Chunk = tuple[int, bytearray, int]
_LAG_BYTES = 256 << 10  # the process blocks while the slowest reader is further behind


class Reader:
    """Position of one attached client in the log."""

    __slots__ = ("offset", "sequence")

    def __init__(self, sequence: int, offset: int) -> None:
        self.sequence = sequence
        self.offset = offset


class OutputLog:
    """Chunks of output, oldest first, numbered from the process's start."""

    def __init__(self, limit_bytes: int) -> None:
        self.finished = False
        self._limit = limit_bytes
        self._chunks: deque[Chunk] = deque()
        self._first_sequence = 0
        self._first_offset = 0  # bytes dropped before the first chunk
        self._end_offset = 0
        self.grown = Waiters()
        self._shrunk = Waiters()
        self._readers: list[Reader] = []

    def append(self, kind: int, buffer: bytearray, size: int) -> None:
        """Add a chunk; the log owns the buffer from now on."""
        self._chunks.append((kind, buffer, size))
        self._end_offset += size
        self._trim()
        self.grown.wake()

    def finish(self) -> None:
        """Let readers end at the end of the log. It may still grow: a child of the process may write later."""
        self.finished = True
        self.grown.wake()

    async def wait_for_room(self) -> None:
        """Wait until no reader is more than _LAG_BYTES behind."""
        while self._readers and self._end_offset - min([reader.offset for reader in self._readers]) > _LAG_BYTES:
            await self._shrunk.wait()

    def open_reader(self, *, replay: bool) -> tuple[Reader, int]:
        """Add a reader; return it and the number of bytes that were dropped before its position.

        :param replay: begin at the oldest byte in the log; false: at its end.
        """
        if replay:
            reader = Reader(self._first_sequence, self._first_offset)
        else:
            reader = Reader(self._first_sequence + len(self._chunks), self._end_offset)
        self._readers.append(reader)
        return reader, reader.offset if replay else 0

    def close_reader(self, reader: Reader) -> None:
        """Remove a reader; the process is no longer blocked by it."""
        self._readers.remove(reader)
        self._trim()
        self._shrunk.wake()

    async def follow(self, reader: Reader, call: Call) -> None:
        """Send chunks to `call` until the log is finished and sent."""
        while True:
            index = reader.sequence - self._first_sequence
            if index < len(self._chunks):
                kind, buffer, size = self._chunks[index]
                await call.send_buffer(kind, buffer, size)
                reader.sequence += 1
                reader.offset += size
                self._trim()
                self._shrunk.wake()
            elif self.finished:
                return
            else:
                await self.grown.wait()

    def _trim(self) -> None:
        if self._end_offset - self._first_offset <= self._limit:
            return
        keep_from = min([reader.offset for reader in self._readers], default=self._end_offset)
        while self._chunks and (excess := self._end_offset - self._first_offset - self._limit) > 0:
            kind, buffer, size = self._chunks[0]
            if self._first_offset + size > keep_from:
                return
            if size - excess > self._limit // 2:  # dropping the whole chunk would leave less than half of the limit
                self._chunks[0] = kind, buffer[:HEADROOM] + buffer[HEADROOM + excess : HEADROOM + size], size - excess
                self._first_offset += excess
                recycle(buffer)
                return
            self._chunks.popleft()
            recycle(buffer)
            self._first_sequence += 1
            self._first_offset += size


_BUFFER_BYTES = HEADROOM + CHUNK_BYTES
_SMALL_BYTES = 16 << 10  # smaller output is copied, so that it does not occupy a whole buffer
_MAX_SPARE = 8
_spare: list[bytearray] = []


def read_chunk(fd: int) -> tuple[bytearray, int]:
    """Read up to CHUNK_BYTES; return a buffer with the bytes after HEADROOM, and their number (0 at EOF).

    :raises BlockingIOError: nothing can be read yet.
    :raises OSError: see read(2).
    """
    buffer = _spare.pop() if _spare else bytearray(_BUFFER_BYTES)
    try:
        with memoryview(buffer) as view:
            size = os.readv(fd, [view[HEADROOM:]])
    except BaseException:
        recycle(buffer)
        raise
    if size > _SMALL_BYTES:
        return buffer, size
    chunk = buffer[: HEADROOM + size]
    recycle(buffer)
    return chunk, size


def recycle(buffer: bytearray) -> None:
    """Keep an unused buffer for `read_chunk`: a new one costs a page fault per page."""
    if len(buffer) == _BUFFER_BYTES and len(_spare) < _MAX_SPARE:
        _spare.append(buffer)
