"""The link to one guest: handshake, calls, keepalive."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from agent.common.errors import DeadlineExceeded, GuestUnreachable, InvalidSpec, ResourceExhausted
from agent.daemon.guestlink.protocol import LinkProtocol
from agent.daemon.guestlink.stream import CallStream
from guest import wire
from guest.wire import Frame, WireError, find_sync
from guest.yamux import YamuxError

_RESYNC_INTERVAL_S = 0.25
_PING_INTERVAL_S = 5.0
_PING_TIMEOUT_S = 30.0
_MAX_NOISE_BYTES = 64 << 20
_OWN_CALLS = "sys."


async def handshake(sock: socket.socket, *, fresh: bool) -> bytes:
    """Speaks `wire.SYNC_REQUEST` until the guest answers; returns bytes that came after its answer.

    :param fresh: the guest has had no host yet, so there is no older session to flush.
    :raises GuestUnreachable: the link was closed, or the guest sends endless noise. Bound it with a timeout.
    """
    loop = asyncio.get_running_loop()
    nonce = os.urandom(wire.NONCE_BYTES)
    received = bytearray()
    noise = 0
    reading = loop.create_task(loop.sock_recv(sock, 64 << 10))
    try:
        await loop.sock_sendall(sock, wire.SYNC_REQUEST + nonce)
        while True:
            done, _ = await asyncio.wait({reading}, timeout=None if fresh else _RESYNC_INTERVAL_S)
            if not done:
                # The flush ends the session of a guest that has read the first word, so its answer must not count.
                nonce = os.urandom(wire.NONCE_BYTES)
                await loop.sock_sendall(sock, bytes(wire.SYNC_FLUSH_BYTES) + wire.SYNC_REQUEST + nonce)
                fresh = True  # once is enough: from now on the guest waits for the word
                continue
            data = reading.result()
            if not data:
                raise GuestUnreachable("the link was closed before the guest answered")
            received += data
            noise += len(data)
            if find_sync(received, wire.SYNC_REPLY) == nonce:
                return bytes(received)
            if noise > _MAX_NOISE_BYTES:
                raise GuestUnreachable("the guest answers with noise")
            reading = loop.create_task(loop.sock_recv(sock, 64 << 10))
    except OSError as error:
        raise GuestUnreachable(f"the link failed: {error}") from error
    finally:
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await reading


class Channel:
    """Calls to one guest over one link. Made by `open`; `lost` completes with the reason when the link is gone."""

    def __init__(self, link: LinkProtocol) -> None:
        self._link = link
        self._open_calls = 0
        self._last_use = time.monotonic()
        self._ping_task = asyncio.create_task(self._keep_alive())

    @classmethod
    async def open(cls, sock: socket.socket, *, fresh: bool = True) -> Channel:
        """Takes a connected, non-blocking socket and returns once the guest has answered the handshake.

        :raises GuestUnreachable: it did not; the socket is closed. Cancellation closes it, too.
        """
        try:
            rest = await handshake(sock, fresh=fresh)
            loop = asyncio.get_running_loop()
            _, link = await loop.connect_accepted_socket(LinkProtocol, sock)
        except BaseException:
            sock.close()
            raise
        if rest:
            try:
                link.session.feed(rest)
            except YamuxError as error:
                link.fail(f"the guest broke the protocol: {error}")
        return cls(link)

    def idle_s(self) -> float:
        """Returns the seconds since the last call of a client ended; 0 while one is open."""
        return 0.0 if self._open_calls else time.monotonic() - self._last_use

    @contextlib.contextmanager
    def _used_by(self, op: str) -> Iterator[None]:
        """Counts a call as use, unless it is the agent's own."""
        if op.startswith(_OWN_CALLS):
            yield
            return
        self._open_calls += 1
        try:
            yield
        finally:
            self._open_calls -= 1
            self._last_use = time.monotonic()

    @property
    def lost(self) -> asyncio.Future[GuestUnreachable]:
        """Completes with the reason once the link is gone. Await it shielded: it is shared."""
        return self._link.lost

    async def call(self, op: str, /, *, timeout_s: float | None = 30.0, **fields: object) -> dict[str, Any]:
        """Makes a call that has one answer. :raises DeadlineExceeded: and what `CallStream.recv` raises."""
        try:
            async with asyncio.timeout(timeout_s), self.stream(op, **fields) as stream:
                while True:
                    frame = await stream.recv()
                    if frame is None:
                        raise GuestUnreachable("the guest ended the call without an answer")
                    if frame[0] is Frame.RESULT:
                        result: dict[str, Any] = frame[1]
                        return result
        except TimeoutError:
            raise DeadlineExceeded(f"the guest did not answer {op} within {timeout_s:g} s", op=op) from None

    @asynccontextmanager
    async def stream(self, op: str, /, **fields: object) -> AsyncIterator[CallStream]:
        """Makes a call with frames both ways; leaving the context before its result abandons it.

        :raises InvalidSpec: the request is over the link's limit. :raises GuestUnreachable: the link is gone.
        :raises ResourceExhausted: too many calls at once.
        """
        if self._link.lost.done():
            raise self._link.lost.result()
        try:
            stream = CallStream(self._link, self._link.session.open())
        except YamuxError as error:
            raise ResourceExhausted(f"too many calls to this sandbox at once: {error}") from None
        try:
            try:
                await stream.start({"op": op, **fields})
            except WireError as error:
                raise InvalidSpec(
                    f"the request is too large: {error}; make it smaller", reason="REQUEST_TOO_LARGE"
                ) from None
            with self._used_by(op):
                yield stream
        finally:
            stream.end()

    async def _keep_alive(self) -> None:
        """Notices a guest that is frozen: no byte arrives although it was asked for a sign of life."""
        link = self._link
        silent_s = 0.0
        seen = -1
        while not link.lost.done():
            link.session.ping(0)
            await asyncio.sleep(_PING_INTERVAL_S)
            silent_s = silent_s + _PING_INTERVAL_S if link.received_bytes == seen else 0.0
            seen = link.received_bytes
            if silent_s >= _PING_TIMEOUT_S:
                link.fail(f"the guest has been silent for {silent_s:g} s")

    async def aclose(self) -> None:
        """Closes the link. The guest and its processes go on. Idempotent."""
        self._ping_task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._ping_task
        self._link.fail("the link was closed by the agent")
