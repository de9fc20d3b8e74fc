"""Two yamux sessions without a link: what one wrote waits until a test delivers it."""

from __future__ import annotations

import struct

from guest import yamux
from guest.yamux import DATA, YamuxSession

MIB = 1 << 20


def frame(kind: int, flags: int, stream_id: int, length: int, payload: bytes = b"", version: int = 0) -> bytes:
    """Written out by hand from the specification, not by the code under test."""
    return struct.pack(">BBHII", version, kind, flags, stream_id, length) + payload


def parse(data: bytes | bytearray) -> list[tuple[int, int, int, int, bytes]]:
    frames, at = [], 0
    while at < len(data):
        version, kind, flags, stream_id, length = struct.unpack_from(">BBHII", data, at)
        assert version == 0
        size = length if kind == DATA else 0
        frames.append((kind, flags, stream_id, length, bytes(data[at + 12 : at + 12 + size])))
        at += 12 + size
    return frames


class End:
    """One session, what it wrote and has not delivered yet, and the streams that it knows."""

    def __init__(self, *, client: bool, max_streams: int = 4096) -> None:
        self.out = bytearray()
        self.streams: list[yamux.Stream] = []
        self.pongs: list[int] = []
        self.session = YamuxSession(
            client=client, write=self.out.extend, on_stream=self.streams.append, max_streams=max_streams
        )
        self.session.on_pong = self.pongs.append

    def open(self) -> yamux.Stream:
        self.streams.append(self.session.open())
        return self.streams[-1]

    def deliver(self, to: End, size: int | None = None) -> None:
        data = bytes(self.out[:size])
        del self.out[: len(data)]
        to.session.feed(data)


def pair(max_streams: int = 4096) -> tuple[End, End]:
    return End(client=True), End(client=False, max_streams=max_streams)


def settle(one: End, two: End) -> None:
    while one.out or two.out:
        one.deliver(two)
        two.deliver(one)


def window_is_whole(stream: yamux.Stream) -> bool:
    """Every byte of the window is the peer's to use, waits to be read, or waits to be granted again."""
    return stream._recv_credit + len(stream.inbox) + stream._consumed == stream._window
