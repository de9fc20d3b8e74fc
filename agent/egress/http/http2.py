"""HTTP/2 relay between a guest and a server: each stream has one counterpart on the other side.

Flow control is end to end: data is acknowledged to its sender once it was sent to the receiver, so that no stream
buffers more than its window here. h2 bounds header tables and lists. RFC 9113.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import h2.connection
import h2.errors
import h2.events
import h2.exceptions

from agent.common.aio import cancel_and_wait
from agent.common.policy.reasons import Reason
from agent.egress.http import secret_injection
from agent.egress.http.h2_endpoint import H2Endpoint, OutgoingStream, ignoring_closed_stream
from agent.egress.http.request_policy import RequestPolicy, answer_for, unreachable
from agent.egress.http.secret_injection import Headers, SecretInjection
from agent.egress.http.stream_replacer import StreamReplacer
from agent.egress.sandbox_state import Denied
from agent.egress.transport.byte_streams import Stream
from agent.egress.transport.dial import DialError

_IDLE_TIMEOUT_S = 900.0


@dataclass(eq=False, slots=True)
class _Exchange:
    """One request and its response, with the stream ids of both sides."""

    guest_id: int
    server_id: int
    body: StreamReplacer | None
    redactor: StreamReplacer | None
    request_ended: bool  # END_STREAM was sent to the server
    response_ended: bool = False  # END_STREAM was sent to the guest


class Http2Relay:
    """Relay of one client connection to one upstream connection; see `agent.egress.http.http1.Http1Relay`."""

    def __init__(self, client: Stream, connect: Callable[[], Awaitable[Stream]], request_policy: RequestPolicy) -> None:
        self._request_policy = request_policy
        self._connect = connect
        self._guest = H2Endpoint(client, client_side=False)
        self._server: H2Endpoint | None = None
        self._by_guest: dict[int, _Exchange] = {}
        self._by_server: dict[int, _Exchange] = {}
        self._server_going_away = False
        self._connected = asyncio.Event()

    async def run(self) -> None:
        """Relay until either side ends.

        :raises OSError: a connection broke.
        """
        tasks = [
            asyncio.create_task(work)
            for work in (self._from_guest(), self._from_server(), self._send(self._guest), self._send_to_server())
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except h2.exceptions.ProtocolError as error:
            self._request_policy.deny(_reason_of(error), self._request_policy.target.name)
        finally:
            await cancel_and_wait(*tasks)
            await self._close()

    async def _close(self) -> None:
        for endpoint in (self._guest, self._server):
            if endpoint is None:
                continue
            with contextlib.suppress(OSError, TimeoutError, h2.exceptions.ProtocolError):
                endpoint.h2.close_connection()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await endpoint.flush()
            endpoint.stream.close()

    # -- reading -------------------------------------------------------------------------------------------------------

    async def _from_guest(self) -> None:
        await self._guest.flush()
        while True:
            async with asyncio.timeout(_IDLE_TIMEOUT_S if not self._by_guest else None):
                data = await self._guest.stream.read()
            if not data:
                return
            for event in self._guest.receive(data):
                await self._on_guest_event(event)
            await self._guest.flush()

    async def _from_server(self) -> None:
        await self._connected.wait()
        assert self._server is not None
        server = self._server
        while data := await server.stream.read():
            for event in server.receive(data):
                self._on_server_event(server, event)
            await server.flush()
            if self._server_going_away and not self._by_server:
                return
        # Send complete responses to the guest before ending.
        while any(queued.ended for queued in self._guest.queued.values()):
            self._guest.sent.clear()
            await self._guest.sent.wait()

    async def _on_guest_event(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            await self._start_exchange(event)
            return
        exchange = self._by_guest.get(getattr(event, "stream_id", 0) or 0)
        if isinstance(event, h2.events.DataReceived) and exchange is None:  # of a rejected stream
            self._guest.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.WindowUpdated | h2.events.RemoteSettingsChanged):
            self._guest.changed.set()
        elif isinstance(event, h2.events.ConnectionTerminated):
            if not self._by_guest:
                raise ConnectionResetError("the client ends the connection")
        elif exchange is not None and self._server is not None:
            self._forward(event, exchange, self._guest, self._server, exchange.server_id)

    def _on_server_event(self, server: H2Endpoint, event: h2.events.Event) -> None:
        exchange = self._by_server.get(getattr(event, "stream_id", 0) or 0)
        if isinstance(event, h2.events.WindowUpdated | h2.events.RemoteSettingsChanged):
            server.changed.set()
        elif isinstance(event, h2.events.ConnectionTerminated):
            self._on_goaway(event)
        elif isinstance(event, h2.events.DataReceived) and exchange is None:
            server.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif exchange is None:
            return
        elif isinstance(event, h2.events.ResponseReceived | h2.events.InformationalResponseReceived):
            headers = secret_injection.redact_headers(_pairs(event.headers), exchange.redactor)
            with ignoring_closed_stream():
                self._guest.h2.send_headers(exchange.guest_id, headers, end_stream=_ends(event))
            if _ends(event):
                exchange.response_ended = True
                self._on_answered(exchange)
            self._guest.changed.set()
        else:
            self._forward(event, exchange, server, self._guest, exchange.guest_id)

    def _forward(
        self, event: h2.events.Event, exchange: _Exchange, source: H2Endpoint, target: H2Endpoint, target_id: int
    ) -> None:
        """Queue data, trailers and end of a stream for the other side, or reset its counterpart."""
        if isinstance(event, h2.events.StreamEnded) and (
            exchange.request_ended if source is self._guest else exchange.response_ended
        ):
            return  # END_STREAM came with the headers
        queued = target.queued.setdefault(target_id, OutgoingStream())
        filtering = exchange.body if source is self._guest else exchange.redactor
        if isinstance(event, h2.events.DataReceived):
            data = event.data if filtering is None else filtering.feed(event.data)
            queued.pieces.append((data, event.flow_controlled_length))
        elif isinstance(event, h2.events.TrailersReceived):
            queued.trailers = _pairs(event.headers)
        elif isinstance(event, h2.events.StreamEnded):
            if filtering is not None and (rest := filtering.end()):
                queued.pieces.append((rest, 0))
            queued.ended = True
        elif isinstance(event, h2.events.StreamReset):
            # The response may be complete without the rest of the request (RFC 9113, 8.1).
            if source is self._server and queued.ended:
                exchange.request_ended = True
                source.queued.pop(exchange.server_id, None)
                return
            with ignoring_closed_stream():
                target.h2.reset_stream(target_id, event.error_code or 0)
            self._forget(exchange)
        target.changed.set()

    # -- requests ------------------------------------------------------------------------------------------------------

    async def _start_exchange(self, event: h2.events.RequestReceived) -> None:
        headers = _pairs(event.headers)
        guest_id = event.stream_id
        fields = dict(headers)
        try:
            authority = _authority(headers)
            path = fields.get(b":path", b"")
            if fields.get(b":method") == b"CONNECT":
                raise Denied(Reason.PROTOCOL_NOT_ALLOWED, authority)
            allowed = await self._request_policy.check(authority, path, headers)
        except Denied as denied:
            self._request_policy.deny(denied.reason, denied.host)
            self._reject(guest_id, *answer_for(denied.reason, denied.host))
            return
        if self._server_going_away:  # the server did not process it, so a retry is safe (RFC 9113, 8.7)
            self._guest.h2.reset_stream(guest_id, h2.errors.ErrorCodes.REFUSED_STREAM)
            return
        if self._server is None:
            try:
                self._server = H2Endpoint(await self._connect(), client_side=True)
            except DialError as error:
                if error.reason is not None:
                    self._request_policy.deny(error.reason, authority)
                self._reject(guest_id, *unreachable(authority, error))
                return
            self._connected.set()
        server = self._server
        injection = allowed.injection
        body = injection.body(secret_injection.find(headers, b"content-type"))
        changed = _injected(headers, injection, has_body=not _ends(event))
        if body is not None:
            changed = [(name, value) for name, value in changed if name != b"content-length"]
        try:
            server_id = server.h2.get_next_available_stream_id()
            server.h2.send_headers(server_id, changed, end_stream=_ends(event))
        except h2.exceptions.TooManyStreamsError:
            self._guest.h2.reset_stream(guest_id, h2.errors.ErrorCodes.REFUSED_STREAM)
            return
        exchange = _Exchange(guest_id, server_id, body, injection.redactor(), _ends(event))
        self._by_guest[guest_id] = self._by_server[server_id] = exchange
        server.changed.set()

    def _reject(self, guest_id: int, status: int, text: bytes) -> None:
        with ignoring_closed_stream():
            self._guest.h2.send_headers(
                guest_id, [(b":status", b"%d" % status), (b"content-type", b"text/plain; charset=utf-8")]
            )
        queued = self._guest.queued.setdefault(guest_id, OutgoingStream())
        queued.pieces.append((text, 0))
        queued.ended = True
        self._guest.changed.set()

    def _forget(self, exchange: _Exchange) -> None:
        self._by_guest.pop(exchange.guest_id, None)
        self._by_server.pop(exchange.server_id, None)
        self._guest.queued.pop(exchange.guest_id, None)
        if self._server is not None:
            self._server.queued.pop(exchange.server_id, None)

    # -- writing -------------------------------------------------------------------------------------------------------

    async def _send_to_server(self) -> None:
        await self._connected.wait()
        assert self._server is not None
        await self._send(self._server)

    async def _send(self, endpoint: H2Endpoint) -> None:
        """Send queued data to one side as its windows open."""
        while True:
            endpoint.changed.clear()
            for stream_id in list(endpoint.queued):
                with ignoring_closed_stream(partial(endpoint.queued.pop, stream_id, None)):
                    await self._send_stream(endpoint, stream_id)
            await endpoint.flush()
            endpoint.sent.set()
            await endpoint.changed.wait()

    async def _send_stream(self, endpoint: H2Endpoint, stream_id: int) -> None:
        queued = endpoint.queued[stream_id]
        while queued.pieces:
            data, counted = queued.pieces[0]
            room = min(endpoint.h2.local_flow_control_window(stream_id), endpoint.h2.max_outbound_frame_size)
            if data and room <= 0:
                return
            piece, rest = data[:room], data[room:]
            if piece:
                endpoint.h2.send_data(stream_id, piece)
                await endpoint.flush()
            if rest:
                queued.pieces[0] = (rest, counted)
                continue
            queued.pieces.pop(0)
            self._acknowledge(endpoint, stream_id, counted)
        if not queued.ended:
            return
        del endpoint.queued[stream_id]
        exchange = (self._by_guest if endpoint is self._guest else self._by_server).get(stream_id)
        if queued.trailers is not None:
            endpoint.h2.send_headers(stream_id, queued.trailers, end_stream=True)
        else:
            endpoint.h2.end_stream(stream_id)
        if exchange is not None and endpoint is self._guest:
            self._on_answered(exchange)
        elif exchange is not None:
            exchange.request_ended = True

    def _acknowledge(self, endpoint: H2Endpoint, stream_id: int, counted: int) -> None:
        """Acknowledge sent data to the side that it came from, which opens its window."""
        exchange = (self._by_guest if endpoint is self._guest else self._by_server).get(stream_id)
        other = self._server if endpoint is self._guest else self._guest
        if exchange is None or other is None or not counted:
            return
        other_id = exchange.server_id if endpoint is self._guest else exchange.guest_id
        with ignoring_closed_stream():
            other.h2.acknowledge_received_data(counted, other_id)
        other.changed.set()

    def _on_answered(self, exchange: _Exchange) -> None:
        if self._server is not None and not exchange.request_ended:
            with ignoring_closed_stream():  # the rest of the request is not needed
                self._server.h2.reset_stream(exchange.server_id, h2.errors.ErrorCodes.NO_ERROR)
            self._server.changed.set()
        self._forget(exchange)

    def _on_goaway(self, event: h2.events.ConnectionTerminated) -> None:
        """Stop new requests after a GOAWAY of the server; existing ones go on (RFC 9113, 6.8)."""
        if event.error_code or not self._by_server:
            raise ConnectionResetError("the server ended the connection")
        self._server_going_away = True
        self._guest.queue_goaway(max(self._by_guest))
        self._guest.changed.set()


def _ends(event: h2.events.Event) -> bool:
    """Return whether END_STREAM came with the headers."""
    return getattr(event, "stream_ended", None) is not None


def _pairs(headers: Any) -> Headers:
    """Return a list of the pairs, each still marked if it must never be indexed (RFC 7541, 7.1.3)."""
    return list(headers or ())


def _injected(headers: Headers, injection: SecretInjection, *, has_body: bool) -> Headers:
    pseudo = {name: value for name, value in headers if name.startswith(b":")}
    path, rest = injection.inject(
        pseudo.get(b":path", b""), [pair for pair in headers if pair[0] not in pseudo], has_body=has_body
    )
    return [*{**pseudo, b":path": path}.items(), *rest]


def _authority(headers: Headers) -> str:
    """Return the authority of a request.

    :raises Denied: it has none, or two that differ.
    """
    named = [value for name, value in headers if name == b":authority"]
    host = [value for name, value in headers if name == b"host"]
    values = {value.lower() for value in (*named, *host)}
    if len(values) > 1:
        raise Denied(Reason.HOST_MISMATCH, host[0].decode("latin-1"))
    if not values:
        raise Denied(Reason.NO_SERVER_NAME)
    return (named or host)[0].decode("latin-1")


def _reason_of(error: h2.exceptions.ProtocolError) -> Reason:
    too_large = isinstance(error, h2.exceptions.DenialOfServiceError) or "header" in type(error).__name__.lower()
    return Reason.TOO_LARGE if too_large else Reason.MALFORMED
