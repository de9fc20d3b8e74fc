"""The host's channel against guests that break the rules: an error that says so, and bounded memory."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable

import pytest

from agent.common.errors import AgentError, GuestError, GuestUnreachable, NotFound
from agent.daemon.guestlink import channel as channel_module
from agent.daemon.guestlink import protocol
from agent.daemon.guestlink.channel import Channel
from guest import wire
from guest.wire import Frame
from guest.yamux import INITIAL_WINDOW, Stream
from tests.support.fake_guest import FakeGuest, channel_to, link_to, when_asked

pytestmark = pytest.mark.timeout(30)
MIB = 1 << 20


# -- the handshake -----------------------------------------------------------------------------------------------------


class Scripted(FakeGuest):
    """Answers the first bytes with what the test wants."""

    def __init__(self, script: Callable[[Scripted, bytes], None]) -> None:
        super().__init__()
        self.script = script

    def data_received(self, data: bytes) -> None:
        self.script(self, data)


def nonces(data: bytes | bytearray) -> list[bytes]:
    return [bytes(part[: wire.NONCE_BYTES]) for part in data.split(wire.SYNC_REQUEST)[1:]]


async def test_a_guest_that_says_nothing_is_waited_for_until_the_caller_gives_up() -> None:
    fake = Scripted(lambda guest, data: None)
    async with link_to(fake) as sock:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await Channel.open(sock)
        assert sock.fileno() == -1
        await fake.closed.wait()


async def test_a_guest_that_hangs_up_at_once() -> None:
    fake = FakeGuest()
    async with link_to(fake) as sock:
        fake.transport.abort()
        await fake.closed.wait()
        with pytest.raises(GuestUnreachable):
            await Channel.open(sock)
        assert sock.fileno() == -1


@pytest.mark.parametrize("last_words", [b"", b"x", wire.SYNC_REPLY, wire.SYNC_REPLY + bytes(15)])
async def test_a_guest_that_hangs_up_instead_of_answering(last_words: bytes) -> None:
    def script(guest: Scripted, data: bytes) -> None:
        guest.transport.write(last_words)
        guest.transport.close()

    async with link_to(Scripted(script)) as sock:
        with pytest.raises(GuestUnreachable, match="closed before"):
            await Channel.open(sock)


async def test_endless_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "_MAX_NOISE_BYTES", 2 * MIB)

    def script(guest: Scripted, data: bytes) -> None:
        guest.transport.write((wire.SYNC_REPLY + bytes(16)) * 100_000)

    async with link_to(Scripted(script)) as sock:
        with pytest.raises(GuestUnreachable, match="no valid handshake"):
            await Channel.open(sock)


async def test_noise_and_older_answers_come_first() -> None:
    def script(guest: Scripted, data: bytes) -> None:
        guest.script = FakeGuest.data_received
        guest.transport.write(b"\xff" * 1000 + wire.SYNC_REPLY + bytes(16) + wire.SYNC_REPLY[:5])
        FakeGuest.data_received(guest, data)

    async with channel_to(Scripted(script)) as channel:
        assert not channel.lost.done()


async def test_bytes_behind_the_answer_belong_to_the_session() -> None:
    class Eager(FakeGuest):
        def answer(self, nonce: bytes) -> None:
            super().answer(nonce)
            assert self.session is not None
            self.session.ping(1)
            self.transport.write(b"\xff" * 12)

    async with channel_to(Eager()) as channel:
        assert isinstance(await asyncio.shield(channel.lost), GuestUnreachable)


@pytest.mark.parametrize("merged", [True, False])
async def test_a_slow_guest_that_answers_both_words(monkeypatch: pytest.MonkeyPatch, merged: bool) -> None:
    """A slow guest has read the first word, answers it late, and then finds the flush and the second one."""
    monkeypatch.setattr(channel_module, "_RESYNC_INTERVAL_S", 0.01)
    seen = bytearray()

    class Slow(Scripted):
        def begin(self, replies: list[bytes]) -> None:
            if replies:
                self.answer(replies[0])
                asyncio.get_running_loop().call_later(0.02, self.begin, replies[1:])

    def script(guest: Scripted, data: bytes) -> None:
        assert isinstance(guest, Slow)
        if guest.session is not None:
            guest.session.feed(data)
            return
        seen.extend(data)
        if len(seen) == 2 * wire.SYNC_BYTES + wire.SYNC_FLUSH_BYTES:
            if merged:
                for nonce in nonces(seen):
                    guest.answer(nonce)
            else:
                guest.begin(nonces(seen))

    guest = Slow(script)
    guest.on_stream = when_asked(lambda stream: stream.send(wire.pack_json(Frame.RESULT, {}), last=True))
    async with channel_to(guest, fresh=False) as channel:
        for _ in range(5):
            assert await channel.call("x") == {}
            await asyncio.sleep(0.01)
        assert not channel.lost.done()


# -- one call ----------------------------------------------------------------------------------------------------------


def head(kind: int, length: int) -> bytes:
    return struct.pack(">BI", kind, length)


@pytest.mark.parametrize(
    ("answer", "expected", "text"),
    [
        (head(9, 0), GuestUnreachable, "unknown frame type"),
        (head(Frame.STDOUT, MIB + 1), GuestUnreachable, "at most"),
        (head(Frame.RESULT, 2 * MIB + 1), GuestUnreachable, "at most"),
        (head(Frame.EOF, 1), GuestUnreachable, "at most"),
        (head(Frame.RESULT, 0), GuestUnreachable, "not JSON"),
        (head(Frame.RESULT, 2) + b"[]", GuestUnreachable, "not a JSON object"),
        (head(Frame.EVENT, 4) + b"\xff\xfe\xfd\xfc", GuestUnreachable, "not JSON"),
        (wire.pack_json(Frame.ERROR, {}), GuestError, "gave no reason"),
        (wire.pack_json(Frame.ERROR, {"code": [1], "message": {"a": []}, "errno": {}}), GuestError, "'a'"),
        (wire.pack_json(Frame.ERROR, {"code": "NOT_FOUND", "message": "m" * 10_000}), NotFound, "^m{4096}$"),
        (b"", GuestUnreachable, "without an answer"),
        (wire.pack_json(Frame.EVENT, {}) + wire.pack(Frame.EOF), GuestUnreachable, "without an answer"),
    ],
)  # fmt: skip
async def test_a_broken_answer_fails_its_call_alone(answer: bytes, expected: type[AgentError], text: str) -> None:
    answers = iter([answer, wire.pack_json(Frame.RESULT, {"fine": True})])
    fake = FakeGuest(when_asked(lambda stream: stream.send(next(answers), last=True)))
    async with channel_to(fake) as channel:
        with pytest.raises(expected, match=text):
            await channel.call("x")
        assert await channel.call("y") == {"fine": True}
        assert not channel._link.session.streams


@pytest.mark.parametrize("word", ["lower", "TOO_LONG_" * 10, "A B", "\u00c4", "", 7, None])
async def test_reasons_are_words_or_the_default(word: object) -> None:
    frame = wire.pack_json(Frame.ERROR, {"code": "STATE", "errno": word})
    async with channel_to(FakeGuest(when_asked(lambda stream: stream.send(frame)))) as channel:
        with pytest.raises(AgentError) as caught:
            await channel.call("x")
        assert caught.value.reason == "INVALID_STATE"


async def test_a_call_that_the_guest_resets() -> None:
    async with channel_to(FakeGuest(when_asked(Stream.reset))) as channel:
        with pytest.raises(GuestUnreachable) as caught:
            await channel.call("x")
        assert caught.value.reason == "GUEST_CALL_ABORTED"


async def test_endless_events_end_with_the_deadline() -> None:
    fake = FakeGuest()

    def flood(stream: Stream) -> None:
        stream.consume(len(stream.inbox))
        while stream.send_credit > 100 and not stream.was_reset:
            stream.send(wire.pack_json(Frame.EVENT, {"n": 1}))

    def on_stream(stream: Stream) -> None:
        stream.on_readable = stream.on_writable = lambda: flood(stream)

    fake.on_stream = on_stream
    async with channel_to(fake) as channel:
        with pytest.raises(AgentError, match=r"within 0.1 s"):
            await channel.call("x", timeout_s=0.1)
        assert not channel._link.session.streams


async def test_a_guest_that_goes_on_after_its_answer_is_not_listened_to() -> None:
    fake = FakeGuest()

    def go_on(stream: Stream) -> None:
        if not stream.was_reset:
            stream.send(bytes(stream.send_credit))

    def answer(stream: Stream) -> None:
        stream.send(wire.pack_json(Frame.RESULT, {}))  # not the end of the stream, which it should be
        asyncio.get_running_loop().call_soon(go_on, stream)

    fake.on_stream = when_asked(answer)
    async with channel_to(fake) as channel:
        calls = channel._link.session.streams
        for _ in range(20):
            await channel.call("x")
        assert fake.session is not None
        pongs: asyncio.Queue[int] = asyncio.Queue()
        channel._link.session.on_pong = pongs.put_nowait
        channel._link.session.ping(9)
        while await pongs.get() != 9:
            pass
        assert sum(len(stream.inbox) for stream in calls.values()) == 0
        assert not calls


# -- the session -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 12,
        struct.pack(">BBHII", 0, 0, 1, 2, 0),
        struct.pack(">BBHII", 0, 0, 0, 1, INITIAL_WINDOW + 1) + bytes(INITIAL_WINDOW + 1),
        struct.pack(">BBHII", 0, 0, 0, 99, 1 << 31),
        struct.pack(">BBHII", 0, 1, 0, 1, 1 << 31) * 2,
        struct.pack(">BBHII", 0, 3, 0, 0, 1),
    ],
    ids=["noise", "opens a stream", "over the window", "huge frame", "absurd window", "gives up"],
)  # fmt: skip
async def test_a_broken_session_ends_every_call_and_the_link(garbage: bytes) -> None:
    fake = FakeGuest()
    async with channel_to(fake) as channel:
        calls = [asyncio.create_task(channel.call("x")) for _ in range(3)]
        await asyncio.sleep(0)
        fake.transport.write(garbage)
        for call in calls:
            with pytest.raises(GuestUnreachable, match="broke the protocol"):
                await call
        assert isinstance(channel.lost.result(), GuestUnreachable)
        with pytest.raises(GuestUnreachable):
            await channel.call("y")
        assert not channel._link.session.streams


async def test_a_guest_that_asks_and_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_MAX_UNSENT_BYTES", MIB)
    fake = FakeGuest()
    async with channel_to(fake) as channel:
        fake.transport.pause_reading()
        fake.transport.write(struct.pack(">BBHII", 0, 2, 1, 0, 7) * (MIB // 4))
        reason = await asyncio.shield(channel.lost)
        assert "does not read" in reason.message


async def test_a_guest_that_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "_PING_INTERVAL_S", 0.01)
    monkeypatch.setattr(channel_module, "_PING_TIMEOUT_S", 0.05)
    fake = FakeGuest()
    async with channel_to(fake) as channel:
        fake.transport.pause_reading()
        with pytest.raises(GuestUnreachable, match=r"silent for 0\.05 s"):
            await channel.call("x")


async def test_a_link_that_is_closed_by_the_vmm() -> None:
    fake = FakeGuest(when_asked(lambda stream: fake.transport.close()))
    async with channel_to(fake) as channel:
        with pytest.raises(GuestUnreachable, match="closed by the virtual machine"):
            await channel.call("x")
