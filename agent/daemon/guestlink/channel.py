"""Channel to one guest: handshake, calls, keepalive."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from agent.common.aio import cancel_and_wait
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
    """Send `wire.SYNC_REQUEST` until the guest answers it; return the bytes that follow its answer.

    Has no timeout of its own.

    :param fresh: the guest had no earlier session; else one is flushed if no answer comes within 0.25 s.
    :raises GuestUnreachable: the link was closed or failed, or 64 MiB arrived without an answer.
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
                # The flush ends a session that the first request began, so the answer to that must not count.
                nonce = os.urandom(wire.NONCE_BYTES)
                await loop.sock_sendall(sock, bytes(wire.SYNC_FLUSH_BYTES) + wire.SYNC_REQUEST + nonce)
                fresh = True  # once is enough: the guest waits for a request from now on
                continue
            data = reading.result()
            if not data:
                raise GuestUnreachable("the link was closed before the guest answered")
            received += data
            noise += len(data)
            if find_sync(received, wire.SYNC_REPLY) == nonce:
                return bytes(received)
            if noise > _MAX_NOISE_BYTES:
                raise GuestUnreachable("the guest sends no valid handshake")
            reading = loop.create_task(loop.sock_recv(sock, 64 << 10))
    except OSError as error:
        raise GuestUnreachable(f"the link failed: {error}") from error
    finally:
        await cancel_and_wait(reading)


class Channel:
    """Calls to one guest over one link; create it with `open`."""

    def __init__(self, link: LinkProtocol) -> None:
        self._link = link
        self._open_calls = 0
        self._last_use = time.monotonic()
        self._ping_task = asyncio.create_task(self._keep_alive())

    @classmethod
    async def open(cls, sock: socket.socket, *, fresh: bool = True) -> Channel:
        """Perform the handshake on a connected, non-blocking socket, which the channel owns from now on.

        :param fresh: the guest had no earlier session.
        :raises GuestUnreachable: the handshake failed; the socket is closed, as after a cancellation.
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
        """Return the seconds since the last call of a client ended; 0 while one is open."""
        return 0.0 if self._open_calls else time.monotonic() - self._last_use

    @contextlib.contextmanager
    def _used_by(self, op: str) -> Iterator[None]:
        """Count a call as use of the sandbox, unless it is one of the daemon's own (sys.*)."""
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
        """Future that completes with the reason once the link is lost. Shared: await it shielded."""
        return self._link.lost

    async def call(self, op: str, /, *, timeout_s: float | None = 30.0, **fields: object) -> dict[str, Any]:
        """Make a call and return its result.

        :param fields: arguments of the operation, as JSON values.
        :raises DeadlineExceeded: no result within `timeout_s`.
        :raises GuestUnreachable: the link is lost, or the guest broke the protocol.
        :raises AgentError: the guest answered with an error; see `error_from_guest`.
        """
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
        """Make a call with frames in both directions; leaving the context before its result aborts it.

        :raises InvalidSpec: the request is larger than the link allows.
        :raises GuestUnreachable: the link is lost.
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
        """Fail the link of a frozen guest, from which no byte arrives for 30 s despite pings."""
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
        """Close the link; the guest and its processes continue. Idempotent."""
        self._link.fail("the link was closed by the agent")
        await cancel_and_wait(self._ping_task)
