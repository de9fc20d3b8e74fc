"""HTTP/1.1 relay between a guest and a server. Messages are parsed and written anew on both sides.

h11 parses strictly and writes canonically, which prevents request smuggling. Bodies are streamed: only bytes that may
be the beginning of a secret are delayed. RFC 9110, 9112.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import h11

from agent.common.aio import cancel_and_wait
from agent.common.policy.reasons import Reason
from agent.egress.http import http1_heads, secret_injection
from agent.egress.http.request_policy import AllowedRequest, RequestPolicy, answer_for, unreachable
from agent.egress.http.secret_injection import Headers
from agent.egress.http.stream_replacer import StreamReplacer
from agent.egress.sandbox_state import Denied
from agent.egress.transport import byte_streams
from agent.egress.transport.byte_streams import Stream
from agent.egress.transport.dial import DialError

MAX_HEAD_BYTES = 64 << 10
_HEAD_TIMEOUT_S = 15.0  # from a request's first byte to the end of its headers
_IDLE_TIMEOUT_S = 900.0
_BUFFERED_BODY_BYTES = 1 << 20  # bodies with secrets up to this size are read whole for Content-Length
_DRAIN_BYTES, _DRAIN_S = 1 << 20, 2.0


class _ConnectionDone(Exception):
    """The connection ended in order."""


class Http1Relay:
    """Relay of one client connection to one upstream connection.

    :param connect: opens the upstream connection; called once the first request is allowed.
    :param request_policy: checks each request.
    """

    def __init__(self, client: Stream, connect: Callable[[], Awaitable[Stream]], request_policy: RequestPolicy) -> None:
        self._client = client
        self._connect = connect
        self._request_policy = request_policy
        self._upstream: Stream | None = None
        self._guest = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._server = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._host = ""
        self._closes = False
        self._bypassed = False  # h11 did not see the last response's body, nor its end

    async def run(self) -> None:
        """Relay until either side ends.

        :raises OSError: a connection broke.
        """
        try:
            while await self._cycle():
                if self._bypassed:
                    self._reset_parsers()
                else:
                    self._guest.start_next_cycle()
                    self._server.start_next_cycle()
            await self._client.send_eof()
            await self._drain()
        except Denied as denied:
            self._request_policy.deny(denied.reason, denied.host)
            await self._answer(denied.reason, denied.host)
        except h11.RemoteProtocolError as error:
            await self._on_protocol_error(error)
        except _ConnectionDone:
            pass
        finally:
            self._client.close()
            if self._upstream is not None:
                self._upstream.close()

    def _reset_parsers(self) -> None:
        pipelined, _ = self._guest.trailing_data
        self._guest = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._server = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._bypassed = False
        if pipelined:
            self._guest.receive_data(pipelined)

    async def _on_protocol_error(self, error: h11.RemoteProtocolError) -> None:
        """Answer invalid HTTP of the guest by 400 or 431, of the server by 502."""
        if self._guest.trailing_data[1] or self._server.trailing_data[1]:
            return  # end of the stream within a message
        if self._guest.their_state is h11.ERROR:
            reason = Reason.TOO_LARGE if error.error_status_hint == 431 else Reason.MALFORMED
            self._request_policy.deny(reason, self._host or self._request_policy.target.name)
            await self._answer(reason, self._host, str(error))
        else:
            await self._answer_status(502, b"sandboxd: the server's answer is not valid HTTP\n")

    async def _answer(self, reason: Reason, host: str, detail: str = "") -> None:
        await self._answer_status(*answer_for(reason, host, detail))

    async def _answer_status(self, status: int, text: bytes) -> None:
        """Send an error response, unless a response has begun, and end the connection."""
        if self._guest.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(text)),
                   (b"connection", b"close")]  # fmt: skip
        with contextlib.suppress(OSError, h11.LocalProtocolError):
            await self._to_guest(
                h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode())
            )
            await self._to_guest(h11.Data(data=text))
            await self._to_guest(h11.EndOfMessage())
            await self._client.send_eof()
            await self._drain()

    async def _drain(self) -> None:
        """Discard some input: closing with unread bytes sends a reset, and the response could be lost."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                left = _DRAIN_BYTES
                while left > 0 and (data := await self._client.read()):
                    left -= len(data)

    # -- one request ---------------------------------------------------------------------------------------------------

    async def _cycle(self) -> bool:
        """Relay one request and its response; return whether another may follow."""
        request = await self._request()
        headers = http1_heads.forwarded(request)
        authority = http1_heads.authority_of(request, headers)
        self._host = authority
        allowed = await self._request_policy.check(authority, request.target, headers)
        if self._upstream is None:
            try:
                self._upstream = await self._connect()
            except DialError as error:
                if error.reason is not None:
                    raise Denied(error.reason, authority) from None
                await self._answer_status(*unreachable(authority, error))
                return False
        upstream = self._upstream
        body = allowed.injection.body(secret_injection.find(headers, b"content-type"))
        sending = asyncio.create_task(self._send_request(upstream, request, headers, allowed, body))
        responding = asyncio.create_task(self._response(upstream, allowed, request))
        try:
            await asyncio.wait({sending, responding}, return_when=asyncio.FIRST_COMPLETED)
            # After OSError in sending, the server may still have answered: it need not read all of the request.
            if sending.done() and not isinstance(sending.exception(), OSError):
                sending.result()
            if await responding:
                await sending
                await self._tunnel(upstream)
                return False
            if not sending.done() or sending.exception() is not None:
                return False  # answered before the request was complete: its rest cannot be skipped
        finally:
            await cancel_and_wait(sending, responding)
        if self._bypassed:
            return self._guest.their_state is h11.DONE and not self._closes
        return self._guest.states == {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE} and (
            self._server.states == {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}
        )

    async def _request(self) -> h11.Request:
        """Return the next request.

        :raises _ConnectionDone: either side ended the connection, or it was idle too long.
        """
        event = self._guest.next_event()
        if event is h11.NEED_DATA and self._guest.trailing_data[0] == b"":
            await self._wait_for_bytes()
            event = self._guest.next_event()
        try:
            async with asyncio.timeout(_HEAD_TIMEOUT_S):
                while event is h11.NEED_DATA:
                    self._guest.receive_data(await self._client.read())
                    event = self._guest.next_event()
        except TimeoutError:
            raise Denied(Reason.TIMEOUT, self._host or self._request_policy.target.name) from None
        if isinstance(event, h11.Request):
            return event
        raise _ConnectionDone

    async def _wait_for_bytes(self) -> None:
        reading = asyncio.create_task(self._client.read())
        waiting: set[asyncio.Task[bytes]] = {reading}
        if self._upstream is not None:
            waiting.add(asyncio.create_task(self._upstream.read()))
        try:
            await asyncio.wait(waiting, timeout=_IDLE_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if any(task.done() for task in waiting - {reading}) or not reading.done():
                raise _ConnectionDone
            self._guest.receive_data(reading.result())
        finally:
            await cancel_and_wait(*waiting)

    async def _send_request(
        self,
        upstream: Stream,
        request: h11.Request,
        headers: Headers,
        allowed: AllowedRequest,
        body: StreamReplacer | None,
    ) -> None:
        injection = allowed.injection
        target, changed = injection.inject(
            http1_heads.origin_form(request.target), headers, has_body=http1_heads.has_body(request)
        )
        first: list[bytes] = []
        if body is not None:
            changed = await self._reframed(changed, body, first)
        out = h11.Request(method=request.method, target=target, headers=changed)
        await self._to_server(upstream, out)
        if first:  # the whole body
            await self._to_server(upstream, h11.Data(data=first[0]))
            await self._to_server(upstream, h11.EndOfMessage())
            return
        while True:
            event = await self._next(self._guest, self._client)
            if isinstance(event, h11.Data):
                data = bytes(event.data) if body is None else body.feed(bytes(event.data))
                if data:
                    await self._to_server(upstream, h11.Data(data=data))
            elif isinstance(event, h11.EndOfMessage):
                if body is not None and (rest := body.end()):
                    await self._to_server(upstream, h11.Data(data=rest))
                await self._to_server(upstream, h11.EndOfMessage(headers=list(event.headers.raw_items())))
                return
            else:
                raise _ConnectionDone

    async def _reframed(self, headers: Headers, body: StreamReplacer, first: list[bytes]) -> Headers:
        """Return headers for a body whose length changes: with a new length if it is small, chunked if it is large."""
        size = secret_injection.find(headers, b"content-length")
        if not size or size == b"0":
            return headers
        rest = [(name, value) for name, value in headers if name.lower() not in (b"content-length", b"expect")]
        if int(size) > _BUFFERED_BODY_BYTES:
            return [*rest, (b"Transfer-Encoding", b"chunked")]
        if self._guest.they_are_waiting_for_100_continue:
            await self._to_guest(h11.InformationalResponse(status_code=100, headers=[]))
        pieces = []
        while isinstance(event := await self._next(self._guest, self._client), h11.Data):
            pieces.append(body.feed(bytes(event.data)))
        pieces.append(body.end())
        whole = b"".join(pieces)
        first.append(whole)
        return [*rest, (b"Content-Length", b"%d" % len(whole))]

    # -- its response --------------------------------------------------------------------------------------------------

    async def _response(self, upstream: Stream, allowed: AllowedRequest, request: h11.Request) -> bool:
        """Relay the response; return whether both sides have switched to another protocol (101)."""
        redactor = allowed.injection.redactor()
        while True:
            event = await self._next(self._server, upstream)
            if isinstance(event, h11.InformationalResponse):
                headers = secret_injection.redact_headers(list(event.headers.raw_items()), redactor)
                await self._to_guest(
                    h11.InformationalResponse(status_code=event.status_code, headers=headers, reason=event.reason)
                )
                if event.status_code == 101:
                    return True
            elif isinstance(event, h11.Response):
                headers = secret_injection.redact_headers(list(event.headers.raw_items()), redactor)
                response = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
                await self._to_guest(response)
                size = http1_heads.body_length(request, event)
                if size is not None:
                    self._closes = http1_heads.says_close(request) or http1_heads.says_close(event)
                    await self._forward_body(upstream, size, redactor)
                    return False
            elif isinstance(event, h11.Data):
                data = bytes(event.data) if redactor is None else redactor.feed(bytes(event.data))
                if data:
                    await self._to_guest(h11.Data(data=data))
            elif isinstance(event, h11.EndOfMessage):
                if redactor is not None and (rest := redactor.end()):
                    await self._to_guest(h11.Data(data=rest))
                await self._to_guest(h11.EndOfMessage(headers=list(event.headers.raw_items())))
                return False
            else:
                raise _ConnectionDone

    async def _forward_body(self, upstream: Stream, left: int, redactor: StreamReplacer | None) -> None:
        """Relay a body of known length past h11, which would copy it four times."""
        self._bypassed = True
        data, _ = self._server.trailing_data
        while True:
            piece = data if len(data) <= left else data[:left]
            self._closes = self._closes or len(piece) < len(data)  # longer than announced
            left -= len(piece)
            if out := piece if redactor is None else redactor.feed(piece):
                await self._client.write(out)
            if not left:
                break
            data = await upstream.read()
            if not data:
                raise _ConnectionDone  # the guest notices, since it knows the length
        if redactor is not None and (rest := redactor.end()):
            await self._client.write(rest)

    async def _tunnel(self, upstream: Stream) -> None:
        to_server, _ = self._guest.trailing_data
        to_guest, _ = self._server.trailing_data
        await byte_streams.relay(self._client, upstream, to_a=to_guest, to_b=to_server)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    async def _next(self, connection: h11.Connection, stream: Stream) -> object:
        while (event := connection.next_event()) is h11.NEED_DATA:
            connection.receive_data(await stream.read())
        return event

    async def _to_guest(self, event: h11.Event) -> None:
        if data := self._guest.send(event):
            await self._client.write(data)

    async def _to_server(self, upstream: Stream, event: h11.Event) -> None:
        if data := self._server.send(event):
            await upstream.write(data)
