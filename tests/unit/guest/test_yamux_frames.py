"""The multiplexer's frames, as hashicorp/yamux specifies them."""

from __future__ import annotations

import pytest

from guest import yamux
from guest.yamux import ACK, DATA, FIN, GO_AWAY, INITIAL_WINDOW, PING, RST, SYN, WINDOW_UPDATE, YamuxError
from tests.support.yamux_ends import MIB, End, frame, pair, parse, settle


def test_first_frames_carry_syn_and_ack_and_later_ones_do_not() -> None:
    client, server = pair()
    stream = client.open()
    assert not client.out
    stream.send(b"ab")
    stream.send(b"c")
    assert parse(client.out) == [(DATA, SYN, 1, 2, b"ab"), (DATA, 0, 1, 1, b"c")]
    client.deliver(server)
    server.streams[0].send(b"d")
    server.streams[0].close()
    assert parse(server.out) == [(DATA, ACK, 1, 1, b"d"), (WINDOW_UPDATE, FIN, 1, 0, b"")]


@pytest.mark.parametrize(
    ("first", "expected"),
    [("widen", (WINDOW_UPDATE, SYN, 1, MIB - INITIAL_WINDOW, b"")), ("close", (WINDOW_UPDATE, SYN | FIN, 1, 0, b"")),
     ("reset", (WINDOW_UPDATE, SYN | RST, 1, 0, b"")), ("last", (DATA, SYN | FIN, 1, 1, b"x"))],
)  # fmt: skip
def test_any_frame_can_be_the_first(first: str, expected: tuple[int, int, int, int, bytes]) -> None:
    client, server = pair()
    stream = client.open()
    {"widen": lambda: stream.widen(MIB), "close": stream.close, "reset": stream.reset,
     "last": lambda: stream.send(b"x", last=True)}[first]()  # fmt: skip
    assert parse(client.out) == [expected]
    client.deliver(server)
    assert [s.id for s in server.streams] == [1]


def test_streams_are_opened_in_order_whichever_speaks_first() -> None:
    client, server = pair()
    first, second, third = (client.open() for _ in range(3))
    third.send(b"c")
    first.send(b"a")
    second.reset()
    assert [(f[1], f[2]) for f in parse(client.out)] == [(SYN, 1), (SYN, 3), (SYN, 5), (0, 1), (RST, 3)]
    client.deliver(server)
    assert [(s.id, bytes(s.inbox)) for s in server.streams] == [(1, b"a"), (3, b""), (5, b"c")]


def test_streams_are_odd_from_the_client_and_even_from_the_server() -> None:
    client, server = pair()
    assert [client.open().id, client.open().id] == [1, 3]
    assert [server.open().id, server.open().id] == [2, 4]


def test_sending_in_place_is_the_same_frame() -> None:
    client, other = pair()[0], End(client=True)
    buffer = bytearray(yamux.HEADER_BYTES) + b"payload and more"
    client.open().send_in_place(buffer, 7)
    other.open().send(b"payload")
    assert client.out == other.out


def test_half_close_leaves_the_other_direction() -> None:
    client, server = pair()
    stream = client.open()
    stream.send(b"question", last=True)
    client.deliver(server)
    peer = server.streams[0]
    assert (bytes(peer.inbox), peer.remote_closed, peer.local_closed) == (b"question", True, False)
    with pytest.raises(ValueError, match="closed"):
        stream.send(b"more")
    peer.send(b"answer")
    server.deliver(client)
    assert (bytes(stream.inbox), stream.remote_closed) == (b"answer", False)
    peer.close()
    settle(client, server)
    assert stream.remote_closed
    assert not client.session.streams
    assert not server.session.streams
    assert bytes(stream.inbox) == b"answer"


@pytest.mark.parametrize("by_client", [True, False])
def test_reset_ends_both_directions_at_once(by_client: bool) -> None:
    client, server = pair()
    stream = client.open()
    stream.send(b"x")
    settle(client, server)
    peer = server.streams[0]
    peer.send(b"never read")
    calls: list[str] = []
    loser = peer if by_client else stream
    loser.on_readable = lambda: calls.append("readable")
    loser.on_writable = lambda: calls.append("writable")
    (stream if by_client else peer).reset()
    (stream if by_client else peer).reset()
    settle(client, server)
    assert stream.was_reset
    assert peer.was_reset
    assert not stream.inbox
    assert not peer.inbox
    assert {"readable", "writable"} <= set(calls)
    assert not client.session.streams
    assert not server.session.streams
    with pytest.raises(ValueError, match="cannot send"):
        stream.send(b"y")


def test_a_reset_in_the_middle_of_a_payload_drops_the_rest() -> None:
    server = End(client=False)
    server.session.feed(frame(DATA, SYN, 1, 100, b"a" * 40))
    server.streams[0].reset()
    server.session.feed(b"a" * 60 + frame(DATA, SYN, 3, 2, b"ok"))
    assert not server.streams[0].inbox
    assert bytes(server.streams[1].inbox) == b"ok"


def test_ping_is_answered_with_its_number() -> None:
    client, server = pair()
    client.session.ping(0xDEADBEEF)
    client.deliver(server)
    assert parse(server.out) == [(PING, ACK, 0, 0xDEADBEEF, b"")]
    server.deliver(client)
    assert client.pongs == [0xDEADBEEF]
    assert not server.pongs


def test_go_away_lets_old_streams_finish_and_new_ones_fail() -> None:
    client, server = pair()
    stream = client.open()
    stream.send(b"x")
    client.deliver(server)
    client.session.feed(frame(GO_AWAY, 0, 0, 0))
    with pytest.raises(YamuxError, match="no more streams"):
        client.open()
    stream.send(b"y", last=True)
    client.deliver(server)
    assert bytes(server.streams[0].inbox) == b"xy"


@pytest.mark.parametrize("code", [1, 2, 3, 99])
def test_go_away_with_an_error_ends_the_session(code: int) -> None:
    with pytest.raises(YamuxError, match=f"code {code}"):
        End(client=True).session.feed(frame(GO_AWAY, 0, 0, code))


def test_abandon_resets_every_stream_and_says_nothing_to_the_peer() -> None:
    client, _ = pair()
    streams = [client.open() for _ in range(3)]
    client.session.abandon()
    assert all(stream.was_reset for stream in streams)
    assert client.session.abandoned
    assert not client.session.streams
    assert not client.out
