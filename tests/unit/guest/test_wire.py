"""Frames and the handshake: limits of every type, any cut of the bytes, and peers that send nonsense."""

from __future__ import annotations

import json
import os
import struct
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agent.daemon.guestlink.stream import error_from_guest
from guest import wire
from guest.wire import Frame, FrameReader, WireError, find_sync
from tests.support.yamux_ends import End, settle

steady = settings(derandomize=True, database=None, deadline=None, max_examples=60)
JSON_KINDS = (Frame.REQUEST, Frame.RESULT, Frame.ERROR, Frame.EVENT)
DATA_KINDS = (Frame.DATA, Frame.STDOUT, Frame.STDERR)
LIMITS = dict.fromkeys(JSON_KINDS, 2 << 20) | dict.fromkeys(DATA_KINDS, 1 << 20) | {Frame.EOF: 0}
NONCE = bytes(range(16))


# -- one frame ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(Frame))
def test_every_type_has_a_limit_in_both_directions(kind: Frame) -> None:
    limit = LIMITS[kind]
    assert wire.pack(kind, bytes(limit)) == struct.pack(">BI", kind, limit) + bytes(limit)
    assert wire.parse_head(b"junk" + struct.pack(">BI", kind, limit), 4) == (kind, limit)
    for action in (
        lambda: wire.pack(kind, bytes(limit + 1)),
        lambda: wire.parse_head(struct.pack(">BI", kind, limit + 1)),
    ):
        with pytest.raises(WireError, match=f"at most {limit} are allowed"):
            action()


@pytest.mark.parametrize("kind", [8, 9, 255])
def test_unknown_types_are_refused_even_when_empty(kind: int) -> None:
    with pytest.raises(WireError, match="unknown frame type"):
        wire.parse_head(struct.pack(">BI", kind, 0))


@given(st.dictionaries(st.text(st.characters(exclude_categories=())), st.text(st.characters(exclude_categories=()))))
@steady
def test_any_text_survives_json_even_half_a_surrogate_pair(value: dict[str, object]) -> None:
    packed = wire.pack_json(Frame.EVENT, value)
    assert packed.isascii() or max(packed[wire.HEAD_BYTES :]) < 128
    # A pair that was written as two halves is read as one character (RFC 8259, section 7).
    assert wire.parse_json(packed[wire.HEAD_BYTES :]) == json.loads(json.dumps(value))


def test_names_that_are_not_utf_8_survive_json() -> None:
    name = os.fsdecode(b"caf\xe9 \xff")
    assert os.fsencode(str(wire.parse_json(wire.pack_json(Frame.EVENT, {"a": name})[5:])["a"])) == b"caf\xe9 \xff"


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"[]", b"null", b'"x"', b"{}{}", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000],
)  # fmt: skip
def test_what_is_not_a_json_object_is_an_error(payload: bytes) -> None:
    with pytest.raises(WireError):
        wire.parse_json(payload)


def test_an_error_of_any_depth_can_be_turned_into_ours() -> None:
    for depth in (10, 300, *range(900, 1000, 7)):
        for inner in (b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth):
            try:
                value = wire.parse_json(b'{"code":%b,"message":%b,"errno":%b}' % (inner, inner, inner))
            except WireError:
                continue
            assert len(error_from_guest(value).message) <= 4096


# -- frames of a stream ------------------------------------------------------------------------------------------------

frames = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([kind for kind in Frame if kind != Frame.EOF]), st.binary(max_size=300)),
        st.just((Frame.EOF, b"")),
    ),
    max_size=12,
)  # fmt: skip


def reader_fed_with(pieces: list[bytes], max_bytes: int) -> list[tuple[int, bytes]]:
    client, server = End(client=True), End(client=False)
    stream = client.open()
    result, reader = [], None
    for piece in pieces:
        stream.send(piece)
        settle(client, server)
        reader = reader or FrameReader(server.streams[0])
        while (frame := reader.next(max_bytes)) is not None:
            result.append(frame)
            assert len(frame[1]) <= max_bytes or frame[0] in JSON_KINDS
    assert not server.streams or not server.streams[0].inbox or len(server.streams[0].inbox) < wire.HEAD_BYTES
    return result


def merged(sequence: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """The same with neighbours of one data type joined, and without empty ones."""
    result: list[tuple[int, bytes]] = []
    for kind, payload in sequence:
        if kind in DATA_KINDS and not payload:
            continue
        if kind in DATA_KINDS and result and result[-1][0] == kind:
            result[-1] = (kind, result[-1][1] + payload)
        else:
            result.append((kind, payload))
    return result


@steady
@given(frames, st.lists(st.integers(0, 4000), max_size=40), st.integers(1, 400))
def test_any_cut_gives_the_same_frames(sequence: list[tuple[int, bytes]], cuts: list[int], max_bytes: int) -> None:
    data = b"".join(struct.pack(">BI", kind, len(payload)) + payload for kind, payload in sequence)
    points = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    pieces = [data[start:end] for start, end in pairwise(points)]
    assert merged(reader_fed_with(pieces, max_bytes)) == merged(sequence)


def test_data_is_handed_out_as_it_arrives_and_json_whole() -> None:
    data = struct.pack(">BI", Frame.DATA, 10) + b"0123456789" + struct.pack(">BI", Frame.RESULT, 2) + b"{}"
    pieces = [data[:8], data[8:15], data[15:21], data[21:]]
    assert reader_fed_with(pieces, 1 << 20) == [(Frame.DATA, b"012"), (Frame.DATA, b"3456789"), (Frame.RESULT, b"{}")]


def test_a_json_frame_larger_than_the_window_arrives_although_nobody_reads_in_between() -> None:
    payload = json.dumps({"a": "x" * (1 << 20)}).encode()
    data = struct.pack(">BI", Frame.REQUEST, len(payload)) + payload
    pieces = [data[at : at + (128 << 10)] for at in range(0, len(data), 128 << 10)]
    assert reader_fed_with(pieces, 100) == [(Frame.REQUEST, payload)]


def test_a_frame_over_its_limit_is_refused_at_its_head() -> None:
    with pytest.raises(WireError, match="at most"):
        reader_fed_with([struct.pack(">BI", Frame.DATA, (1 << 20) + 1)], 100)
    with pytest.raises(WireError, match="unknown"):
        reader_fed_with([b"\xff" * 5], 100)


@steady
@given(st.binary(max_size=200))
def test_noise_is_frames_or_an_error(noise: bytes) -> None:
    try:
        handed_out = reader_fed_with([noise], 100)
    except WireError:
        return
    assert sum(len(payload) for _, payload in handed_out) <= len(noise)


# -- the handshake -----------------------------------------------------------------------------------------------------

nonces = st.binary(min_size=16, max_size=16)
words = st.sampled_from([wire.SYNC_REQUEST, wire.SYNC_REPLY])
garbage = st.lists(
    st.one_of(
        st.binary(max_size=60), words, words.map(lambda word: word[:-3]), words.map(lambda word: word + bytes(16)),
        st.just(b"\xff" * 9),
    ),
    max_size=8,
).map(b"".join)  # fmt: skip


@steady
@given(
    garbage,
    st.binary(max_size=40),
    words,
    st.lists(st.integers(0, 1000), max_size=12),
    st.binary(min_size=16, max_size=16),
)
def test_the_word_is_found_after_anything_at_any_cut(
    before: bytes, after: bytes, word: bytes, cuts: list[int], nonce: bytes
) -> None:
    data = before + word + nonce
    assume(word not in (word + nonce + after)[1:])  # the later one would count
    assume(word not in before[-wire.SYNC_BYTES + 1 :])  # one cut short takes what follows for its nonce
    points = [0, *sorted(cut % len(data) for cut in cuts), len(data)]
    buffer, found = bytearray(), []
    for start, end in pairwise(points):
        buffer += data[start:end] + (after if end == len(data) and start < end else b"")
        found.append(find_sync(buffer, word))
    assert found[-1] == nonce
    assert bytes(buffer) == after


def test_one_byte_at_a_time() -> None:
    buffer, found = bytearray(), None
    for byte in os.urandom(100) + wire.SYNC_REPLY + NONCE:
        assert found is None
        buffer.append(byte)
        found = find_sync(buffer, wire.SYNC_REPLY)
    assert found == NONCE
    assert not buffer


def test_answers_to_older_words_lose_against_the_last() -> None:
    buffer = bytearray(wire.SYNC_REPLY + bytes(16) + b"noise" + wire.SYNC_REPLY + NONCE + b"rest")
    assert find_sync(buffer, wire.SYNC_REPLY) == NONCE
    assert buffer == b"rest"


def test_the_request_is_no_answer() -> None:
    assert find_sync(bytearray(wire.SYNC_REQUEST + NONCE), wire.SYNC_REPLY) is None


@pytest.mark.parametrize("noise", [b"\0", b"\xff", wire.SYNC_REQUEST[:-1], wire.SYNC_REPLY])
def test_noise_without_end_is_not_collected(noise: bytes) -> None:
    buffer = bytearray()
    for _ in range(200):
        buffer += noise * (4096 // len(noise))
        find_sync(buffer, wire.SYNC_REQUEST)
        assert len(buffer) <= wire.SYNC_BYTES


def test_the_flush_ends_any_frame_that_the_guest_may_be_in() -> None:
    from agent.daemon.guestlink.stream import SEND_CHUNK_BYTES
    from guest.yamux import INITIAL_WINDOW, YamuxError

    assert max(SEND_CHUNK_BYTES + wire.HEAD_BYTES, INITIAL_WINDOW) + 24 <= wire.SYNC_FLUSH_BYTES
    server = End(client=False)
    server.session.feed(struct.pack(">BBHII", 0, 0, 1, 1, INITIAL_WINDOW))
    with pytest.raises(YamuxError):
        server.session.feed(bytes(wire.SYNC_FLUSH_BYTES))
