"""The far end of a link as a script: a guest that may do whatever a test wants."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from agent.daemon.guestlink.channel import Channel
from guest import wire
from guest.yamux import Stream, YamuxSession


class FakeGuest(asyncio.Protocol):
    """Answers the handshake; then `on_stream` gets each stream of the host."""

    def __init__(self, on_stream: Callable[[Stream], None] | None = None) -> None:
        self.on_stream = on_stream or (lambda stream: None)
        self.received = bytearray()
        self.session: YamuxSession | None = None
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    def data_received(self, data: bytes) -> None:
        if self.session is not None:
            self.session.feed(data)
            return
        self.received += data
        nonce = wire.find_sync(self.received, wire.SYNC_REQUEST)
        if nonce is not None:
            self.answer(nonce)

    def answer(self, nonce: bytes) -> None:
        self.session = YamuxSession(client=False, write=self.transport.write, on_stream=self.on_stream)
        self.transport.write(wire.SYNC_REPLY + nonce)


def when_asked(reply: Callable[[Stream], None]) -> Callable[[Stream], None]:
    """Makes an `on_stream` that calls `reply` once the request is here; further bytes are read and dropped."""

    def on_stream(stream: Stream) -> None:
        asked = False

        def on_readable() -> None:
            nonlocal asked
            if stream.inbox:
                stream.consume(len(stream.inbox))
                if not asked:
                    asked = True
                    reply(stream)

        stream.on_readable = on_readable

    return on_stream


@asynccontextmanager
async def link_to(guest: FakeGuest) -> AsyncIterator[socket.socket]:
    """Yields the host's socket of a link to the fake guest."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    transport, _ = await asyncio.get_running_loop().connect_accepted_socket(lambda: guest, theirs)
    try:
        yield ours
    finally:
        transport.abort()
        await guest.closed.wait()
        ours.close()


@asynccontextmanager
async def channel_to(guest: FakeGuest, *, fresh: bool = True) -> AsyncIterator[Channel]:
    """Yields a channel to the fake guest."""
    async with link_to(guest) as sock, asyncio.timeout(10):
        channel = await Channel.open(sock, fresh=fresh)
        try:
            yield channel
        finally:
            await channel.aclose()
