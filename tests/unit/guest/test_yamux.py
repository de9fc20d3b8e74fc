"""The multiplexer: what holds for every script of calls and every cut of the bytes."""

from __future__ import annotations

import contextlib
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from guest import yamux
from guest.yamux import INITIAL_WINDOW, YamuxError
from tests.support.yamux_ends import End, pair, settle, window_is_whole

steady = settings(derandomize=True, database=None, deadline=None, max_examples=60)

sizes = st.one_of(st.integers(0, 40), st.integers(0, INITIAL_WINDOW))
operations = st.lists(
    st.tuples(st.sampled_from(["send", "last", "close", "reset", "widen", "ping"]), st.integers(0, 3), sizes),
    max_size=25,
)


def perform(end: End, stream: yamux.Stream, what: str, size: int) -> None:
    if what == "ping":
        end.session.ping(size)
    elif what == "close":
        stream.close()
    elif what == "reset":
        stream.reset()
    elif what == "widen":
        stream.widen(INITIAL_WINDOW + size)
    elif not stream.local_closed and not stream.was_reset:
        stream.send(bytes(min(size, stream.send_credit)), last=what == "last")


@steady
@given(operations, st.lists(st.integers(0, 200_000), max_size=30), st.booleans())
def test_any_cut_of_the_bytes_means_the_same(
    script: list[tuple[str, int, int]], cuts: list[int], one_byte: bool
) -> None:
    client = End(client=True)
    for what, number, size in script:
        while len(client.streams) <= number:
            client.open()
        perform(client, client.streams[number], what, size % 300 if one_byte else size)
    data = bytes(client.out)
    points = list(range(len(data) + 1)) if one_byte else sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    whole, pieces = End(client=False), End(client=False)
    whole.session.feed(data)
    for start, end in pairwise(points):
        pieces.session.feed(bytearray(data[start:end]))

    def seen(end: End) -> object:
        facts = [(s.id, bytes(s.inbox), s.remote_closed, s.was_reset, s.send_credit) for s in end.streams]
        return facts, bytes(end.out), sorted(end.session.streams)

    assert seen(whole) == seen(pieces)


steps = st.lists(
    st.tuples(
        st.sampled_from(["open", "send", "send", "last", "read", "read", "cross", "cross", "widen", "ping"]),
        st.booleans(), st.integers(0, 7), sizes,
    ),
    min_size=15, max_size=120,
)  # fmt: skip


class Traffic:
    """What each side sent and what the other read, while a script runs."""

    def __init__(self) -> None:
        self.ends = dict(zip((True, False), pair(), strict=True))
        self.sent: dict[tuple[bool, int], bytearray] = {}
        self.read: dict[tuple[bool, int], bytearray] = {}

    def step(self, count: int, what: str, side: bool, number: int, size: int) -> None:
        end = self.ends[side]
        if what == "open":
            end.open()
        elif what == "cross":
            end.deliver(self.ends[not side], size)
        elif what == "ping":
            end.session.ping(size)
        elif end.streams:
            self.use(count, what, side, end.streams[number % len(end.streams)], size)

    def use(self, count: int, what: str, side: bool, stream: yamux.Stream, size: int) -> None:
        if what == "read":
            self.read.setdefault((side, stream.id), bytearray()).extend(stream.inbox[:size])
            stream.consume(min(size, len(stream.inbox)))
        elif what == "widen":
            stream.widen(INITIAL_WINDOW + size)
        elif not stream.local_closed:
            data = (count.to_bytes(2, "big") * (size // 2 + 1))[: min(size, stream.send_credit)]
            self.sent.setdefault((not side, stream.id), bytearray()).extend(data)
            stream.send(data, last=what == "last")

    def read_all(self) -> None:
        settle(self.ends[True], self.ends[False])
        for side, end in self.ends.items():
            for stream in end.streams:
                self.use(0, "read", side, stream, len(stream.inbox))
        settle(self.ends[True], self.ends[False])


@settings(steady, max_examples=150)
@given(steps)
def test_streams_carry_everything_in_order_and_windows_stay_whole(script: list[tuple[str, bool, int, int]]) -> None:
    traffic = Traffic()
    client, server = traffic.ends[True], traffic.ends[False]
    for count, step in enumerate(script):
        traffic.step(count, *step)
        for stream in (*client.streams, *server.streams):
            assert len(stream.inbox) <= stream._window
            assert stream.remote_closed or window_is_whole(stream)
    traffic.read_all()
    assert {key: data for key, data in traffic.read.items() if data} == {
        key: data for key, data in traffic.sent.items() if data
    }
    known = {stream.id: stream for stream in server.streams}
    for stream in client.streams:
        peer = known.get(stream.id)
        if peer is not None and not stream.local_closed:
            assert stream.send_credit == peer._recv_credit
        if peer is not None and not peer.local_closed:
            assert peer.send_credit == stream._recv_credit


@steady
@given(st.binary(max_size=400), st.booleans())
def test_noise_never_does_worse_than_a_protocol_error(noise: bytes, client: bool) -> None:
    end = End(client=client)
    end.open()
    with contextlib.suppress(YamuxError):
        end.session.feed(noise)
    assert sum(len(stream.inbox) for stream in end.streams) <= len(noise)
