"""HTTP/2 at the ingress (RFC 9113): each stream is one HTTP/1.1 request to the exposed port, on its own connection.

Windows are given back as bodies are taken, so a slow service slows its own client alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import h11

from agent.common.aio import quietly
from agent.gateway.nodes.guest_tcp import GuestStream, why

_READ_BYTES = 256 << 10
_MAX_STREAMS = 100
_PREFACE_BYTES, _HEAD_BYTES, _MAX_FRAME_BYTES = 24, 9, 16 << 10  # RFC 9113, 3.4, 4.1 and 6.5.2
_IDLE_S = 120.0
_MAX_HEADER_BYTES = 64 << 10
_HOP_BY_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
})  # fmt: skip

Dial = Callable[[], Awaitable[GuestStream]]
Headers = list[tuple[bytes, bytes]]


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, dial: Dial) -> None:
    """Serves one connection until the client closes it."""
    await _Connection(writer, dial).serve(reader)


class _Body:
    """What a client has sent of a request's body and nobody has taken yet; the window bounds it."""

    def __init__(self) -> None:
        self.chunks: asyncio.Queue[tuple[bytes, int] | None] = asyncio.Queue()


class _FrameLimit:
    """Looks at the length of each frame as it begins: h2 collects up to 16 MiB before it says that it is too large."""

    def __init__(self) -> None:
        self._skip = _PREFACE_BYTES
        self._head = bytearray()

    def allows(self, data: bytes) -> bool:
        """Whether no frame that begins in these bytes, the next of the connection, is too large."""
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
                at += step
                continue
            piece = data[at : at + _HEAD_BYTES - len(self._head)]
            self._head += piece
            at += len(piece)
            if len(self._head) == _HEAD_BYTES:
                self._skip = int.from_bytes(self._head[:3], "big")
                if self._skip > _MAX_FRAME_BYTES:
                    return False
                self._head.clear()
        return True


class _Connection:
    def __init__(self, writer: asyncio.StreamWriter, dial: Dial) -> None:
        self._writer = writer
        self._dial = dial
        config = h2.config.H2Configuration(client_side=False, header_encoding=None)
        self._h2 = h2.connection.H2Connection(config)
        self._limit = _FrameLimit()
        self._bodies: dict[int, _Body] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._window = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader) -> None:
        self._h2.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: _MAX_STREAMS,
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: _MAX_HEADER_BYTES,
                h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20,
            },
        )
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(8 << 20)
        try:
            await self._flush()
            while data := await self._read(reader):
                if not self._limit.allows(data):
                    break
                for event in self._h2.receive_data(data):
                    self._take(event)
                await self._flush()
        except h2.exceptions.ProtocolError:
            await self._flush()  # h2 has put a GOAWAY there that says why
        finally:
            for task in self._tasks.values():
                task.cancel()
            await quietly(*self._tasks.values())

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        """Returns what the client sends; b"" at its end, or if nothing has been asked for in a while."""
        while True:
            try:
                async with asyncio.timeout(_IDLE_S):
                    return await reader.read(_READ_BYTES)
            except TimeoutError:
                if not self._tasks:
                    return b""

    async def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data:
            self._writer.write(data)
        await self._writer.drain()

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            body = self._bodies[event.stream_id] = _Body()
            task = asyncio.create_task(self._answer(event.stream_id, event.headers, body))
            self._tasks[event.stream_id] = task
            task.add_done_callback(functools.partial(self._forget, event.stream_id))
        elif isinstance(event, h2.events.DataReceived):
            body_of = self._bodies.get(event.stream_id)
            if body_of is not None:
                body_of.chunks.put_nowait((event.data, event.flow_controlled_length))
            else:
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            ended = self._bodies.get(event.stream_id)
            if ended is not None:
                ended.chunks.put_nowait(None)
        elif isinstance(event, h2.events.StreamReset):
            task_of = self._tasks.get(event.stream_id)
            if task_of is not None:
                task_of.cancel()
        elif isinstance(event, h2.events.WindowUpdated | h2.events.RemoteSettingsChanged):
            self._window.set()

    def _forget(self, stream_id: int, _done: asyncio.Task[None]) -> None:
        self._tasks.pop(stream_id, None)
        body = self._bodies.pop(stream_id, None)
        while body is not None and not body.chunks.empty():
            waiting = body.chunks.get_nowait()
            if waiting is not None:
                self._acknowledge(stream_id, waiting[1])

    def _acknowledge(self, stream_id: int, size: int) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError, ValueError):  # the stream, or the connection, is over
            self._h2.acknowledge_received_data(size, stream_id)

    async def _answer(self, stream_id: int, headers: Any, body: _Body) -> None:
        # The client has reset the stream, or is gone: nobody is there to be told anything.
        with contextlib.suppress(h2.exceptions.ProtocolError, ConnectionError):
            await self._exchange(stream_id, headers, body)

    async def _exchange(self, stream_id: int, headers: Any, body: _Body) -> None:
        try:
            stream = await self._dial()
        except (grpc.aio.AioRpcError, ConnectionError) as error:
            await self._send_head(stream_id, 502, [(b"content-type", b"text/plain")])
            await self._send_data(stream_id, f"nothing answers in the sandbox: {why(error)}\n".encode(), last=True)
            return
        try:
            await _Exchange(stream).run(
                _request(headers), self._body(stream_id, body),
                lambda status, fields: self._send_head(stream_id, status, fields),
                lambda data, last: self._send_data(stream_id, data, last=last),
            )  # fmt: skip
        except (h11.ProtocolError, grpc.aio.AioRpcError, EOFError, asyncio.InvalidStateError):
            self._h2.reset_stream(stream_id, error_code=2)  # INTERNAL_ERROR
            await self._flush()
        finally:
            stream.close()

    async def _body(self, stream_id: int, body: _Body) -> AsyncIterator[bytes]:
        while (chunk := await body.chunks.get()) is not None:
            yield chunk[0]
            self._acknowledge(stream_id, chunk[1])
            await self._flush()

    async def _send_head(self, stream_id: int, status: int, headers: Headers) -> None:
        self._h2.send_headers(stream_id, [(b":status", str(status).encode()), *headers])
        await self._flush()

    async def _send_data(self, stream_id: int, data: bytes, *, last: bool) -> None:
        view = memoryview(data)
        while view:
            room = min(self._h2.local_flow_control_window(stream_id), self._h2.max_outbound_frame_size)
            if room <= 0:
                self._window.clear()
                await self._window.wait()
                continue
            self._h2.send_data(stream_id, bytes(view[:room]))
            view = view[room:]
            await self._flush()
        if last:
            self._h2.end_stream(stream_id)
            await self._flush()


def _request(headers: Any) -> h11.Request:
    """Returns the HTTP/1.1 request of a stream's headers. :raises h11.ProtocolError: they make none."""
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


class _Exchange:
    """One HTTP/1.1 request and its response on a connection of its own."""

    def __init__(self, stream: GuestStream) -> None:
        self._stream = stream
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEADER_BYTES)

    async def run(
        self, request: h11.Request, body: AsyncIterator[bytes],
        on_head: Callable[[int, Headers], Awaitable[None]], on_data: Callable[[bytes, bool], Awaitable[None]],
    ) -> None:  # fmt: skip
        """Carries it out. :raises h11.ProtocolError, EOFError: the service broke off. :raises grpc.aio.AioRpcError:"""
        await self._send(request)
        sending = asyncio.create_task(self._send_body(body))
        try:
            while True:
                event = await self._next()
                if isinstance(event, h11.Response):
                    kept = [(name, value) for name, value in event.headers if name not in _HOP_BY_HOP]
                    await on_head(event.status_code, kept)
                elif isinstance(event, h11.Data):
                    await on_data(bytes(event.data), False)
                elif isinstance(event, h11.EndOfMessage):
                    await on_data(b"", True)
                    return
        finally:
            sending.cancel()
            await quietly(sending)

    async def _send(self, event: Any) -> None:
        data = self._h11.send(event)
        if data:
            await self._stream.write(data)

    async def _send_body(self, body: AsyncIterator[bytes]) -> None:
        with contextlib.suppress(h11.LocalProtocolError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async for data in body:
                await self._send(h11.Data(data=data))
            await self._send(h11.EndOfMessage())

    async def _next(self) -> Any:
        while True:
            event = self._h11.next_event()
            if event is not h11.NEED_DATA:
                if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                    raise EOFError
                return event
            self._h11.receive_data(await self._stream.read())
