"""What a process has written: kept for replay up to a limit, and followed by any number of readers.

A reader that is attached loses nothing: the process waits for the slowest one (`has_room`). Without readers the oldest
bytes are dropped, so that a process nobody looks at never stops.
"""

from __future__ import annotations

import os
from collections import deque

from guest.call import CHUNK_BYTES, HEADROOM, Call
from guest.reactor import Waiters

# A chunk: (kind of frame, buffer with HEADROOM in front, bytes in it).
Chunk = tuple[int, bytearray, int]
_LAG_BYTES = 256 << 10  # how far the slowest reader may be behind before the process has to wait


class Reader:
    """One attached client's place in the log."""

    __slots__ = ("offset", "sequence")

    def __init__(self, sequence: int, offset: int) -> None:
        self.sequence = sequence
        self.offset = offset


class OutputLog:
    """Chunks of output, oldest first, with absolute numbers that never start again."""

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
        """Adds a chunk; the buffer belongs to the log from now on."""
        self._chunks.append((kind, buffer, size))
        self._end_offset += size
        self._trim()
        self.grown.wake()

    def finish(self) -> None:
        """Says that readers need not wait for more. The log may grow later all the same (a child of the process
        writes).
        """
        self.finished = True
        self.grown.wake()

    async def room(self) -> None:
        """Waits until no reader is too far behind."""
        while self._readers and self._end_offset - min([reader.offset for reader in self._readers]) > _LAG_BYTES:
            await self._shrunk.wait()

    def open_reader(self, *, replay: bool) -> tuple[Reader, int]:
        """Returns a reader at the oldest byte kept (or at the end), and the number of bytes that are lost before it."""
        if replay:
            reader = Reader(self._first_sequence, self._first_offset)
        else:
            reader = Reader(self._first_sequence + len(self._chunks), self._end_offset)
        self._readers.append(reader)
        return reader, reader.offset if replay else 0

    def close_reader(self, reader: Reader) -> None:
        """Ends a reader; the process no longer waits for it."""
        self._readers.remove(reader)
        self._trim()
        self._shrunk.wake()

    async def follow(self, reader: Reader, call: Call) -> None:
        """Sends chunks to `call` until the log is finished and all of it is sent."""
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
            if size - excess > self._limit // 2:  # without it, less than half of the limit would be left
                self._chunks[0] = kind, buffer[:HEADROOM] + buffer[HEADROOM + excess : HEADROOM + size], size - excess
                self._first_offset += excess
                recycle(buffer)
                return
            self._chunks.popleft()
            recycle(buffer)
            self._first_sequence += 1
            self._first_offset += size


_BUFFER_BYTES = HEADROOM + CHUNK_BYTES
_SMALL_BYTES = 16 << 10  # output up to this size is copied, so that a few bytes do not hold a whole buffer
_MAX_SPARE = 8
_spare: list[bytearray] = []


def read_chunk(fd: int) -> tuple[bytearray, int]:
    """Reads what is there, at most CHUNK_BYTES: (buffer with HEADROOM in front, bytes read; 0 at the end).

    :raises OSError: see read(2); BlockingIOError if there is nothing yet.
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
    """Takes a buffer that nobody reads any more: a fresh one costs a page fault for each of its pages."""
    if len(buffer) == _BUFFER_BYTES and len(_spare) < _MAX_SPARE:
        _spare.append(buffer)
