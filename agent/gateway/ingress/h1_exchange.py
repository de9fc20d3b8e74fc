"""HTTP/1.1 request to a port of a sandbox on behalf of one HTTP/2 stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import h11

from agent.common.aio import cancel_and_wait
from agent.gateway.nodes.guest_stream import GuestStream

MAX_HEADER_BYTES = 64 << 10
_HOP_BY_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
})  # fmt: skip

Headers = list[tuple[bytes, bytes]]


def request_from_h2(headers: Any) -> h11.Request:
    """Convert the header list of an HTTP/2 request (RFC 9113, 8.3) to an HTTP/1.1 request.

    :raises h11.ProtocolError: the headers are not a valid request.
    """
    pseudo = {name: value for name, value in headers if name.startswith(b":")}
    plain = [(name, value) for name, value in headers if not name.startswith(b":") and name not in _HOP_BY_HOP]
    cookies = [value for name, value in plain if name == b"cookie"]
    fields = [(name, value) for name, value in plain if name not in (b"cookie", b"host")]
    fields.insert(0, (b"host", pseudo.get(b":authority", b"") or dict(plain).get(b"host", b"")))
    if cookies:
        fields.append((b"cookie", b"; ".join(cookies)))
    method = pseudo.get(b":method", b"")
    if b"content-length" not in dict(plain) and method not in (b"GET", b"HEAD", b"OPTIONS", b"DELETE", b"TRACE"):
        fields.append((b"transfer-encoding", b"chunked"))
    fields.append((b"connection", b"close"))
    return h11.Request(method=method, target=pseudo.get(b":path", b""), headers=fields)


class H1Exchange:
    """Client of one HTTP/1.1 request and its response, on its own connection."""

    def __init__(self, stream: GuestStream) -> None:
        self._stream = stream
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADER_BYTES)

    async def run(
        self, request: h11.Request, body: AsyncIterator[bytes],
        on_head: Callable[[int, Headers], Awaitable[None]], on_data: Callable[[bytes, bool], Awaitable[None]],
    ) -> None:  # fmt: skip
        """Send the request and its body, and pass on the response.

        :param on_head: called with status and headers, interim responses excluded.
        :param on_data: called with each piece of the body, and with True for the end.
        :raises h11.ProtocolError: the service sent malformed HTTP.
        :raises EOFError: the service closed the connection early.
        :raises grpc.aio.AioRpcError: the connection is lost.
        """
        await self._send(request)
        sending = asyncio.create_task(self._send_body(body))
        try:
            while True:
                event = await self._next_event()
                if isinstance(event, h11.Response):
                    kept = [(name, value) for name, value in event.headers if name not in _HOP_BY_HOP]
                    await on_head(event.status_code, kept)
                elif isinstance(event, h11.Data):
                    await on_data(bytes(event.data), False)
                elif isinstance(event, h11.EndOfMessage):
                    await on_data(b"", True)
                    return
        finally:
            await cancel_and_wait(sending)

    async def _send(self, event: Any) -> None:
        data = self._h11.send(event)
        if data:
            await self._stream.write(data)

    async def _send_body(self, body: AsyncIterator[bytes]) -> None:
        with contextlib.suppress(h11.LocalProtocolError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async for data in body:
                await self._send(h11.Data(data=data))
            await self._send(h11.EndOfMessage())

    async def _next_event(self) -> Any:
        while True:
            event = self._h11.next_event()
            if event is not h11.NEED_DATA:
                if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                    raise EOFError
                return event
            self._h11.receive_data(await self._stream.read())
