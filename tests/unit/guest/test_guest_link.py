"""The guest's end of the link: hosts that vanish at any byte, hosts that break the rules, and what is left of them."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator, Iterator

import pytest

from agent.common.errors import AgentError
from agent.daemon.guestlink import channel as channel_module
from agent.daemon.guestlink.channel import Channel
from guest import wire
from guest.wire import Frame
from guest.yamux import INITIAL_WINDOW
from tests.support import guest_child
from tests.support.guest_child import MIB, Guest, collect
from tests.support.serial_port import SerialPort

pytestmark = pytest.mark.timeout(60)
WORD = wire.SYNC_REQUEST + bytes(range(16))
ANSWER = wire.SYNC_REPLY + bytes(range(16))


@pytest.fixture(scope="module")
def child() -> Iterator[Guest]:
    with guest_child.guest() as child:
        yield child


@pytest.fixture(scope="module")
def guests_end() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = guest_child.start("port", theirs)
        yield ours
        guest_child.end(process)


@pytest.fixture
async def port(guests_end: socket.socket, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SerialPort]:
    monkeypatch.setattr(channel_module, "_RESYNC_INTERVAL_S", 0.05)
    port = SerialPort(guests_end)
    yield port
    await port.aclose()


async def use_until_lost(sock: socket.socket) -> None:
    """Moves bytes both ways, with calls that come and go, until the link is torn."""
    channel = await Channel.open(sock, fresh=False)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(collect(channel, "test.echo", bytes(8 * MIB)))
            tasks.create_task(collect(channel, "test.source", bytes=8 * MIB))
            tasks.create_task(channel.call("test.hang"))
            for _ in range(50):
                await channel.call("test.open")
            await asyncio.shield(channel.lost)
    finally:
        await channel.aclose()


async def is_well(port: SerialPort) -> None:
    """A new host finds a guest that serves it and has forgotten the others."""
    async with asyncio.timeout(10):
        channel = await Channel.open(port.plug(), fresh=False)
        try:
            result, data, _ = await collect(channel, "test.echo", b"x" * 300_000, text="again")
            assert (result["bytes"], result["text"], len(data[Frame.DATA])) == (300_000, "again", 300_000)
            while (await channel.call("test.counts"))["running"]:
                pass
        finally:
            await channel.aclose()


def cut_points() -> list[int]:
    chance = random.Random(1)
    near = [1, 7, 16, 17, 32, 33, 34, 44, 45, 46, 50, 60]
    return near + [chance.randrange(60, 3000) for _ in range(10)] + [chance.randrange(3000, 4 * MIB) for _ in range(10)]


@pytest.mark.parametrize("way", ["up_bytes", "down_bytes"])
async def test_a_link_may_be_torn_at_any_byte(port: SerialPort, way: str) -> None:
    for point in cut_points():
        try:
            async with asyncio.timeout(10):
                await use_until_lost(port.plug(**{way: point}))
        except* AgentError:
            pass
        await is_well(port)


async def test_a_first_host_needs_no_flush(port: SerialPort) -> None:
    await is_well(port)
    async with asyncio.timeout(5):
        channel = await Channel.open(port.plug())
    assert await channel.call("test.open") == {}
    await channel.aclose()


# -- hosts that break the rules ----------------------------------------------------------------------------------------


class Raw:
    """A host that sends bytes as it likes."""

    def __init__(self, guest: Guest) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(guest.path))

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (more := self.sock.recv(size - len(data))):
            data += more
        return data

    def greet(self) -> None:
        """Shakes hands; what the guest still had to say before does not matter."""
        self.send(WORD)
        data = b""
        while not data.endswith(ANSWER):
            more = self.receive(1)
            assert more, data
            data += more


def frame(kind: int, flags: int, stream_id: int, length: int, payload: bytes = b"") -> bytes:
    return struct.pack(">BBHII", 0, kind, flags, stream_id, length) + payload


def request(stream_id: int, op: str) -> bytes:
    data = wire.pack_json(Frame.REQUEST, {"op": op})
    return frame(0, 1, stream_id, len(data), data)


@pytest.fixture
def host(child: Guest) -> Iterator[Raw]:
    with Raw(child) as host:
        yield host


@pytest.mark.parametrize(
    "garbage",
    [
        bytes(12),
        b"\xff" * 100,
        frame(0, 1, 2, 0),
        frame(0, 1, 1, INITIAL_WINDOW + 1, bytes(INITIAL_WINDOW + 1)),
        frame(0, 0, 1, 1 << 30),
        frame(3, 0, 0, 2),
    ],
    ids=["zeros", "noise", "even stream", "over the window", "huge frame", "gives up"],
)
def test_after_garbage_the_guest_waits_for_the_word(host: Raw, garbage: bytes) -> None:
    host.greet()
    host.send(garbage + b"more" * 1000)
    host.greet()
    host.send(frame(2, 1, 0, 5))
    assert host.receive(12) == frame(2, 2, 0, 5)


@pytest.mark.parametrize("size", [1, 5, 33])
def test_the_word_in_pieces_after_noise(host: Raw, size: int) -> None:
    data = wire.SYNC_REQUEST[:7] + random.Random(size).randbytes(5000) + WORD
    for at in range(0, len(data), size):
        host.send(data[at : at + size])
    assert host.receive(wire.SYNC_BYTES) == ANSWER


def test_the_next_host_may_use_the_same_streams_at_once(host: Raw) -> None:
    host.greet()
    host.send(request(1, "test.hang") + frame(2, 1, 0, 1))
    assert host.receive(12) == frame(2, 2, 0, 1)
    for _ in range(5):
        host.send(bytes(12) + WORD + request(1, "test.hang"))
        assert host.receive(wire.SYNC_BYTES) == ANSWER
    host.send(frame(1, 8, 1, 0) + request(3, "test.open") + frame(2, 1, 0, 2))
    assert frame(2, 2, 0, 2) in host.receive(12 + 12 + len(wire.pack_json(Frame.RESULT, {})))


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"op":1}', b'{"op":"none"}', b"\xff" * 40, b"[" * 5000],
    ids=["empty", "half", "list", "number", "unknown", "noise", "deep"],
)
def test_a_broken_request_fails_its_call_alone(host: Raw, body: bytes) -> None:
    host.greet()
    data = struct.pack(">BI", Frame.REQUEST, len(body)) + body
    host.send(frame(0, 1 | 4, 1, len(data), data))
    head = host.receive(12)
    assert head[1] == 0
    answer = host.receive(struct.unpack(">I", head[8:])[0])
    assert answer[0] == Frame.ERROR
    host.send(frame(2, 1, 0, 1))
    assert host.receive(12) == frame(2, 2, 0, 1)


def test_a_first_frame_that_is_no_request(host: Raw) -> None:
    host.greet()
    data = struct.pack(">BI", Frame.DATA, 3) + b"abc"
    host.send(frame(0, 1, 1, len(data), data))
    assert b"must be a request" in host.receive(100)


def test_a_host_that_reads_nothing_is_dropped_with_what_it_asked_for(child: Guest) -> None:
    before = child.rss_bytes()
    with Raw(child) as host:
        host.greet()
        host.sock.settimeout(0.2)
        try:
            for _ in range(200):
                host.send(frame(2, 1, 0, 1) * 10_000)  # asks for 24 MiB of answers
        except (TimeoutError, BrokenPipeError, ConnectionResetError):
            pass
    with Raw(child) as host:
        host.greet()
    assert child.rss_bytes() - before < 24 * MIB
