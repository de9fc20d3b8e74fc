"""Yamux, the stream multiplexer on the link between host and guest, without I/O (sans-I/O).

Both sides run this code: pass received bytes to `YamuxSession.feed`; the callback `write` gets the bytes to send. The
format is HashiCorp's yamux specification (spec.md of hashicorp/yamux, version 0). Each stream has its own window, so
that a slow reader stops only its own writer, and the memory of a stream is bounded by the window.

    0         1       2         4             8            12
    | version | type  | flags   | stream id   | length      | payload of DATA frames
"""

from __future__ import annotations

import struct
from collections.abc import Callable

HEADER = struct.Struct(">BBHII")
HEADER_BYTES = HEADER.size
INITIAL_WINDOW = 256 << 10  # fixed by the specification
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
GO_AWAY_NORMAL, GO_AWAY_PROTOCOL_ERROR, GO_AWAY_INTERNAL_ERROR = range(3)
MAX_WINDOW = 16 << 20

Buffer = bytes | bytearray | memoryview


class YamuxError(Exception):
    """The peer broke the protocol: the session cannot be used any more."""


def _nothing() -> None:
    """Do nothing: the default callback."""


class Stream:
    """One stream of a session. Not thread-safe, like the session.

    `on_readable` is called when `inbox`, `remote_closed` or `was_reset` has changed; `on_writable` when `send_credit`
    has grown or the stream was reset. Bytes in `inbox` use up the window until `consume` removes them.
    """

    __slots__ = (
        "_consumed", "_recv_credit", "_window", "id", "inbox", "local_closed", "on_readable", "on_writable",
        "remote_closed", "send_credit", "session", "was_reset",
    )  # fmt: skip

    def __init__(self, session: YamuxSession, stream_id: int) -> None:
        self.session = session
        self.id = stream_id
        self.inbox = bytearray()
        self.send_credit = INITIAL_WINDOW
        self.local_closed = False
        self.remote_closed = False
        self.was_reset = False
        self.on_readable: Callable[[], None] = _nothing
        self.on_writable: Callable[[], None] = _nothing
        self._window = INITIAL_WINDOW
        self._recv_credit = INITIAL_WINDOW
        self._consumed = 0

    def send(self, data: Buffer, *, last: bool = False) -> None:
        """Send all of `data`.

        :param last: close this side of the stream in the same frame.
        :raises ValueError: `data` is longer than `send_credit` (wait for `on_writable`), or the stream is closed.
        """
        size = len(data)
        flags = self._take_credit(size) | (FIN if last else 0)
        self.session.write(HEADER.pack(0, DATA, flags, self.id, size) + data)
        if last:
            self.local_closed = True
            self.session.forget_if_done(self)

    def send_in_place(self, buffer: bytearray, size: int) -> None:
        """Send `buffer[HEADER_BYTES:HEADER_BYTES + size]` without a copy; the header is written before it.

        :raises ValueError: as `send`.
        """
        HEADER.pack_into(buffer, 0, 0, DATA, self._take_credit(size), self.id, size)
        self.session.write(memoryview(buffer)[: HEADER_BYTES + size])

    def _take_credit(self, size: int) -> int:
        if size > self.send_credit or self.local_closed or self.was_reset:
            raise ValueError(f"cannot send {size} bytes on stream {self.id}: credit {self.send_credit}, or closed")
        self.send_credit -= size
        return self.session.first_flags(self.id)

    def consume(self, size: int) -> None:
        """Remove the first `size` bytes of `inbox`; grant the peer new credit once half of the window was consumed."""
        del self.inbox[:size]
        self._consumed += size
        if self._consumed >= self._window // 2 and not self.remote_closed and not self.was_reset:
            self._grant(self._consumed)
            self._consumed = 0

    def widen(self, window: int) -> None:
        """Enlarge the receive window to `window` bytes, at most MAX_WINDOW. May be the first frame of a stream."""
        extra = min(window, MAX_WINDOW) - self._window
        if extra > 0 and not self.remote_closed and not self.was_reset:
            self._window += extra
            self._grant(extra)

    def _grant(self, size: int) -> None:
        self._recv_credit += size
        self.session.write(HEADER.pack(0, WINDOW_UPDATE, self.session.first_flags(self.id), self.id, size))

    def close(self) -> None:
        """Close this side of the stream (FIN); the peer may go on sending. Idempotent."""
        if not self.local_closed and not self.was_reset:
            self.local_closed = True
            flags = FIN | self.session.first_flags(self.id)
            self.session.write(HEADER.pack(0, WINDOW_UPDATE, flags, self.id, 0))
            self.session.forget_if_done(self)

    def reset(self) -> None:
        """Abandon the stream in both directions (RST). Idempotent."""
        if not self.was_reset and not (self.local_closed and self.remote_closed):
            flags = RST | self.session.first_flags(self.id)
            self.session.write(HEADER.pack(0, WINDOW_UPDATE, flags, self.id, 0))
            self.abandon()

    def abandon(self) -> None:
        """Mark the stream as reset without sending RST: the session has ended, or the RST came from the peer."""
        self.was_reset = True
        self.inbox.clear()
        self.session.forget_if_done(self)
        self.on_readable()
        self.on_writable()

    def receive(self, data: memoryview) -> None:
        """Append payload to `inbox`. For the session only.

        :raises YamuxError: the peer sent more than the window.
        """
        self._recv_credit -= len(data)
        if self._recv_credit < 0:
            raise YamuxError(f"stream {self.id}: the peer sent more than its window")
        if not self.remote_closed and not self.was_reset:
            self.inbox += data
            self.on_readable()


class YamuxSession:
    """One yamux session over one reliable byte stream.

    :param client: whether this side initiated the link (the host).
    :param write: called with each frame to send, in order; must send or copy it before it returns.
    :param on_stream: called with each stream that the peer opens; None: the peer may open none (a YamuxError).
    """

    def __init__(
        self, *, client: bool, write: Callable[[Buffer], None], on_stream: Callable[[Stream], None] | None,
        max_streams: int = 4096,
    ) -> None:  # fmt: skip
        self.write = write
        self.streams: dict[int, Stream] = {}
        self.on_pong: Callable[[int], None] = lambda _opaque: None
        self.peer_going_away = False
        self.abandoned = False
        self._on_stream = on_stream
        self._max_streams = max_streams
        self._peer_parity = 0 if client else 1
        self._next_id = 1 if client else 2
        self._last_peer_id = 0
        self._greetings: dict[int, int] = {}  # stream id -> SYN or ACK that its first frame carries
        self._head = bytearray()
        self._stream: Stream | None = None  # whose payload is arriving; None: payload of a stream that is gone
        self._payload_left = 0
        self._ending = 0  # FIN or RST of the frame whose payload is arriving

    def open(self) -> Stream:
        """Return a new stream; its first frame will carry SYN.

        :raises YamuxError: too many streams are open, or the peer has sent GO_AWAY.
        """
        if self.peer_going_away or len(self.streams) >= self._max_streams or self._next_id > 0xFFFF_FFFD:
            raise YamuxError("no more streams on this session")
        stream = Stream(self, self._next_id)
        self._next_id += 2
        self.streams[stream.id] = stream
        self._greetings[stream.id] = SYN
        return stream

    def first_flags(self, stream_id: int) -> int:
        """Return SYN or ACK if the next frame of this stream is the first from this side, else 0.

        Sends SYN for streams with lower ids first: the peer expects streams in the order of their ids.
        """
        flags = self._greetings.pop(stream_id, 0)
        if flags == SYN:
            for older in [other for other in self._greetings if other < stream_id and self._greetings[other] == SYN]:
                del self._greetings[older]
                self.write(HEADER.pack(0, WINDOW_UPDATE, SYN, older, 0))
        return flags

    def forget_if_done(self, stream: Stream) -> None:
        """Remove a stream that is closed in both directions; its `inbox` stays readable."""
        if stream.was_reset or (stream.local_closed and stream.remote_closed):
            self.streams.pop(stream.id, None)
            self._greetings.pop(stream.id, None)

    def ping(self, opaque: int) -> None:
        """Send a ping; `on_pong` is called with the same number when the answer comes."""
        self.write(HEADER.pack(0, PING, SYN, 0, opaque))

    def abandon(self) -> None:
        """Mark all streams as reset, after the link was lost."""
        self.abandoned = True
        for stream in list(self.streams.values()):
            stream.abandon()

    def feed(self, data: Buffer) -> None:
        """Process bytes from the link, which may be cut anywhere.

        :raises YamuxError: the peer broke the protocol; close the link.
        """
        view = memoryview(data)
        position, end = 0, len(view)
        while position < end:
            if self._payload_left:
                size = min(self._payload_left, end - position)
                self._payload(view[position : position + size])
                position += size
            elif not self._head and end - position >= HEADER_BYTES:
                self._header(*HEADER.unpack_from(view, position))
                position += HEADER_BYTES
            else:
                size = min(HEADER_BYTES - len(self._head), end - position)
                self._head += view[position : position + size]
                position += size
                if len(self._head) == HEADER_BYTES:
                    fields = HEADER.unpack(self._head)
                    self._head.clear()
                    self._header(*fields)

    def _payload(self, data: memoryview) -> None:
        if self._stream is not None:
            self._stream.receive(data)
        self._payload_left -= len(data)
        if not self._payload_left:
            self._end(self._stream, self._ending)

    def _header(self, version: int, kind: int, flags: int, stream_id: int, length: int) -> None:
        if version != 0 or kind > GO_AWAY or flags > 15:
            raise YamuxError(f"bad header: version {version}, type {kind}, flags {flags}")
        if kind == PING:
            if flags & SYN:
                self.write(HEADER.pack(0, PING, ACK, 0, length))
            else:
                self.on_pong(length)
        elif kind == GO_AWAY:
            self.peer_going_away = True
            if length != GO_AWAY_NORMAL:
                raise YamuxError(f"the peer gave up with code {length}")
        elif stream_id == 0:
            raise YamuxError("data for stream 0")
        else:
            self._stream_frame(kind, flags, stream_id, length)

    def _stream_frame(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        if flags & SYN:
            self._accept(stream_id)
        stream = self.streams.get(stream_id)
        if kind == DATA and length:
            if length > MAX_WINDOW:
                raise YamuxError(f"frame of {length} bytes is larger than any window")
            self._stream, self._payload_left, self._ending = stream, length, flags & (FIN | RST)
            return
        if kind == WINDOW_UPDATE and length and stream is not None:
            if stream.send_credit + length > 1 << 31:
                raise YamuxError(f"stream {stream_id}: absurd window")
            stream.send_credit += length
            stream.on_writable()
        self._end(stream, flags)

    def _accept(self, stream_id: int) -> None:
        if self._on_stream is None or stream_id % 2 != self._peer_parity or stream_id <= self._last_peer_id:
            raise YamuxError(f"the peer may not open stream {stream_id}")
        self._last_peer_id = stream_id
        if len(self.streams) >= self._max_streams:
            self.write(HEADER.pack(0, WINDOW_UPDATE, RST, stream_id, 0))
            return
        stream = Stream(self, stream_id)
        self.streams[stream_id] = stream
        self._greetings[stream_id] = ACK
        self._on_stream(stream)

    def _end(self, stream: Stream | None, flags: int) -> None:
        if stream is None or not flags & (FIN | RST):
            return
        if flags & RST:
            stream.abandon()
        else:
            stream.remote_closed = True
            self.forget_if_done(stream)
            stream.on_readable()
