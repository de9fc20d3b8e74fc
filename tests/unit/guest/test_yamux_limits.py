"""The multiplexer against peers that break the rules: an error or nothing, and never memory without bound."""

from __future__ import annotations

import tracemalloc

import pytest

from guest import yamux
from guest.yamux import ACK, DATA, FIN, GO_AWAY, INITIAL_WINDOW, PING, RST, SYN, WINDOW_UPDATE, YamuxError
from tests.support.yamux_ends import MIB, End, frame, pair, parse, settle, window_is_whole


@pytest.mark.parametrize(
    "data",
    [
        frame(DATA, SYN, 1, 0, version=1),
        frame(4, 0, 1, 0),
        frame(255, 0, 1, 0),
        frame(DATA, SYN | 16, 1, 0),
        frame(WINDOW_UPDATE, 0x8000, 1, 0),
        frame(DATA, 0, 0, 0),
        frame(WINDOW_UPDATE, SYN, 0, 0),
        bytes(12),
    ],
    ids=["version", "type", "type 255", "flags", "high flags", "stream 0", "open stream 0", "zeros"],
)
def test_bad_headers_end_the_session(data: bytes) -> None:
    with pytest.raises(YamuxError):
        End(client=False).session.feed(data)


def test_a_peer_may_open_only_streams_of_its_own_kind_in_rising_order() -> None:
    server = End(client=False)
    server.session.feed(frame(DATA, SYN, 1, 0) + frame(DATA, SYN, 7, 0))
    for stream_id in (7, 5, 1, 8, 2):
        fresh = End(client=False)
        fresh.session.feed(frame(DATA, SYN, 1, 0) + frame(DATA, SYN, 7, 0))
        with pytest.raises(YamuxError, match=f"may not open stream {stream_id}"):
            fresh.session.feed(frame(DATA, SYN, stream_id, 0))
    with pytest.raises(YamuxError, match="may not open stream 3"):
        End(client=True).session.feed(frame(DATA, SYN, 3, 0))
    End(client=True).session.feed(frame(DATA, SYN, 2, 0))


def test_a_finished_stream_is_not_opened_again() -> None:
    client, server = pair()
    client.open().send(b"", last=True)
    client.deliver(server)
    server.streams[0].close()
    with pytest.raises(YamuxError):
        server.session.feed(frame(DATA, SYN, 1, 0))


def test_a_session_without_a_handler_takes_no_streams() -> None:
    session = yamux.YamuxSession(client=True, write=lambda data: None, on_stream=None)
    with pytest.raises(YamuxError, match="may not open"):
        session.feed(frame(DATA, SYN, 2, 0))


@pytest.mark.parametrize("pieces", [1, 3])
def test_data_over_the_window_ends_the_session(pieces: int) -> None:
    server = End(client=False)
    server.session.feed(frame(DATA, SYN, 1, 0))
    size = INITIAL_WINDOW // pieces
    for _ in range(pieces):
        server.session.feed(frame(DATA, 0, 1, size, bytes(size)))
    with pytest.raises(YamuxError, match="window"):
        server.session.feed(frame(DATA, 0, 1, pieces + 1, bytes(pieces + 1)))
    assert len(server.streams[0].inbox) <= INITIAL_WINDOW


def test_one_frame_larger_than_the_window_is_refused_without_being_held() -> None:
    server = End(client=False)
    with pytest.raises(YamuxError, match="window"):
        server.session.feed(frame(DATA, SYN, 1, INITIAL_WINDOW + 1, bytes(INITIAL_WINDOW + 1)))
    assert len(server.streams[0].inbox) <= INITIAL_WINDOW


@pytest.mark.parametrize("stream_id", [1, 99])
def test_a_frame_larger_than_any_window_is_refused_at_its_header(stream_id: int) -> None:
    server = End(client=False)
    server.session.feed(frame(DATA, SYN, 1, 0))
    with pytest.raises(YamuxError, match="larger than any window"):
        server.session.feed(frame(DATA, 0, stream_id, yamux.MAX_WINDOW + 1))


def test_data_over_the_window_counts_after_fin_too() -> None:
    server = End(client=False)
    server.session.feed(frame(DATA, SYN | FIN, 1, INITIAL_WINDOW, bytes(INITIAL_WINDOW)))
    with pytest.raises(YamuxError, match="window"):
        server.session.feed(frame(DATA, 0, 1, 1, b"x"))


def test_data_after_fin_is_dropped() -> None:
    server = End(client=False)
    server.session.feed(frame(DATA, SYN | FIN, 1, 2, b"ab") + frame(DATA, 0, 1, 1, b"c"))
    assert bytes(server.streams[0].inbox) == b"ab"


def test_frames_for_unknown_streams_are_ignored_with_their_payload() -> None:
    server = End(client=False)
    server.session.feed(
        frame(DATA, 0, 9, 5, b"\xff" * 5) + frame(WINDOW_UPDATE, 0, 9, 7) + frame(WINDOW_UPDATE, RST, 4, 0)
        + frame(DATA, FIN, 2, 3, b"abc") + frame(DATA, SYN, 1, 2, b"ok")
    )  # fmt: skip
    assert [(stream.id, bytes(stream.inbox)) for stream in server.streams] == [(1, b"ok")]
    assert not server.out


def test_a_window_may_grow_to_the_limit_and_no_further() -> None:
    client, _ = pair()
    stream = client.open()
    client.session.feed(frame(WINDOW_UPDATE, ACK, 1, (1 << 31) - INITIAL_WINDOW))
    assert stream.send_credit == 1 << 31
    with pytest.raises(YamuxError, match="absurd window"):
        client.session.feed(frame(WINDOW_UPDATE, 0, 1, 1))


def test_widening_grants_the_difference_once_and_has_a_limit() -> None:
    client, server = pair()
    stream = client.open()
    stream.send(b"x")
    settle(client, server)
    peer = server.streams[0]
    peer.widen(MIB)
    peer.widen(MIB)
    peer.widen(1)
    assert [f[3] for f in parse(server.out)] == [MIB - INITIAL_WINDOW]
    settle(client, server)
    assert stream.send_credit == MIB - 1
    assert window_is_whole(peer)
    peer.widen(1 << 31)
    settle(client, server)
    assert stream.send_credit == yamux.MAX_WINDOW - 1


def test_a_window_is_given_back_in_halves_only() -> None:
    client, server = pair()
    stream = client.open()
    stream.send(bytes(INITIAL_WINDOW))
    client.deliver(server)
    peer = server.streams[0]
    peer.consume(INITIAL_WINDOW // 2 - 1)
    assert not server.out
    peer.consume(1)
    assert parse(server.out) == [(WINDOW_UPDATE, ACK, 1, INITIAL_WINDOW // 2, b"")]


def test_sending_over_the_credit_is_an_error_of_the_caller_and_sends_nothing() -> None:
    client, _ = pair()
    stream = client.open()
    with pytest.raises(ValueError, match="credit"):
        stream.send(bytes(INITIAL_WINDOW + 1))
    assert not client.out
    assert stream.send_credit == INITIAL_WINDOW


def test_streams_over_the_limit_are_reset_and_the_rest_go_on() -> None:
    client, server = pair(max_streams=2)
    streams = [client.open() for _ in range(3)]
    for stream in streams:
        stream.send(b"x")
    settle(client, server)
    assert [stream.was_reset for stream in streams] == [False, False, True]
    assert len(server.session.streams) == 2
    streams[0].reset()
    client.open().send(b"y")
    settle(client, server)
    assert bytes(server.streams[-1].inbox) == b"y"


def test_the_opener_keeps_its_own_limit() -> None:
    end = End(client=True, max_streams=1)
    stream = end.open()
    with pytest.raises(YamuxError, match="no more streams"):
        end.open()
    stream.reset()
    end.open()


def test_a_session_that_churns_streams_keeps_nothing_of_them() -> None:
    client, server = pair()
    for _ in range(2000):
        stream = client.open()
        stream.send(b"x", last=True)
        client.deliver(server)
        server.streams.pop().send(b"y", last=True)
        server.deliver(client)
        client.streams.clear()
    for end in (client, server):
        assert not end.session.streams
        assert not end.session._greetings


def flood(server: End) -> None:
    for round_ in range(64):
        for number in range(8):  # four of them are refused
            flags = 0 if round_ else SYN
            server.session.feed(frame(DATA, flags, 2 * number + 1, 16 << 10, bytes(16 << 10)))


def test_memory_is_bounded_by_the_windows_whatever_the_peer_sends() -> None:
    server = End(client=False, max_streams=4)
    tracemalloc.start()
    try:
        with pytest.raises(YamuxError):
            flood(server)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * INITIAL_WINDOW * 2
    assert sum(len(stream.inbox) for stream in server.streams) <= 4 * INITIAL_WINDOW


def test_endless_frames_that_mean_nothing_hold_nothing() -> None:
    end = End(client=True)
    end.open().send(b"x")
    end.out.clear()
    noise = frame(PING, ACK, 0, 1) + frame(GO_AWAY, 0, 0, 0) + frame(WINDOW_UPDATE, 0, 1, 0) + frame(DATA, ACK, 1, 0)
    for _ in range(1000):
        end.session.feed(noise + frame(DATA, 0, 9, 100, bytes(100)))
    assert not end.out
    assert not end.streams[0].inbox
    assert len(end.session.streams) == 1
