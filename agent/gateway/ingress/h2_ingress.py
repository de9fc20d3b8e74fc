"""HTTP/2 server of the ingress (RFC 9113): each stream becomes one HTTP/1.1 request on its own connection to the port.

Flow-control windows grow as the service reads request bodies, so that a slow service slows down its own client alone.
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

from agent.common.aio import cancel_and_wait
from agent.gateway.ingress.h1_exchange import MAX_HEADER_BYTES, H1Exchange, Headers, request_from_h2
from agent.gateway.ingress.relay import READ_BYTES
from agent.gateway.nodes.guest_stream import GuestStream, describe_error

_MAX_STREAMS = 100
_PREFACE_BYTES, _FRAME_HEADER_BYTES, _MAX_FRAME_BYTES = 24, 9, 16 << 10  # RFC 9113, 3.4, 4.1 and 6.5.2
_STREAM_WINDOW_BYTES, _CONNECTION_WINDOW_BYTES = 1 << 20, 8 << 20
_IDLE_S = 120.0

Dial = Callable[[], Awaitable[GuestStream]]


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, dial: Dial) -> None:
    """Serve one connection until the client closes it or is idle."""
    await _H2Connection(writer, dial).serve(reader)


def unreachable_text(error: BaseException) -> bytes:
    """Return the body of a 502 response for a failed connection to the sandbox."""
    return f"nothing answers in the sandbox: {describe_error(error)}\n".encode()


class _RequestBody:
    """Received pieces of a request's body with their flow-controlled lengths, then None. The window bounds the sum."""

    def __init__(self) -> None:
        self.chunks: asyncio.Queue[tuple[bytes, int] | None] = asyncio.Queue()


class FrameSizeLimit:
    """Checks the length in each frame header early: h2 buffers up to 16 MiB before it rejects a frame."""

    def __init__(self) -> None:
        self._skip = _PREFACE_BYTES
        self._head = bytearray()

    def allows(self, data: bytes) -> bool:
        """Return whether every frame that begins in these bytes, the next ones of the connection, is small enough."""
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
                at += step
                continue
            piece = data[at : at + _FRAME_HEADER_BYTES - len(self._head)]
            self._head += piece
            at += len(piece)
            if len(self._head) == _FRAME_HEADER_BYTES:
                self._skip = int.from_bytes(self._head[:3], "big")
                if self._skip > _MAX_FRAME_BYTES:
                    return False
                self._head.clear()
        return True


class _H2Connection:
    """One HTTP/2 connection of a client, with one task per stream."""

    def __init__(self, writer: asyncio.StreamWriter, dial: Dial) -> None:
        self._writer = writer
        self._dial = dial
        config = h2.config.H2Configuration(client_side=False, header_encoding=None)
        self._h2 = h2.connection.H2Connection(config)
        self._limit = FrameSizeLimit()
        self._bodies: dict[int, _RequestBody] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._window = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader) -> None:
        self._h2.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: _MAX_STREAMS,
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEADER_BYTES,
                h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: _STREAM_WINDOW_BYTES,
            },
        )
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(_CONNECTION_WINDOW_BYTES)
        try:
            await self._flush()
            while data := await self._read(reader):
                if not self._limit.allows(data):
                    break
                for event in self._h2.receive_data(data):
                    self._handle_event(event)
                await self._flush()
        except h2.exceptions.ProtocolError:
            await self._flush()  # sends the GOAWAY that h2 has queued
        finally:
            await cancel_and_wait(*self._tasks.values())

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        """Return the next bytes of the client; b"" at its end, or after a while without any open stream."""
        while True:
            try:
                async with asyncio.timeout(_IDLE_S):
                    return await reader.read(READ_BYTES)
            except TimeoutError:
                if not self._tasks:
                    return b""

    async def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data:
            self._writer.write(data)
        await self._writer.drain()

    def _handle_event(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            body = self._bodies[event.stream_id] = _RequestBody()
            task = asyncio.create_task(self._answer(event.stream_id, event.headers, body))
            self._tasks[event.stream_id] = task
            task.add_done_callback(functools.partial(self._forget, event.stream_id))
        elif isinstance(event, h2.events.DataReceived):
            known = self._bodies.get(event.stream_id)
            if known is not None:
                known.chunks.put_nowait((event.data, event.flow_controlled_length))
            else:
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            ended = self._bodies.get(event.stream_id)
            if ended is not None:
                ended.chunks.put_nowait(None)
        elif isinstance(event, h2.events.StreamReset):
            running = self._tasks.get(event.stream_id)
            if running is not None:
                running.cancel()
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
        with contextlib.suppress(h2.exceptions.ProtocolError, ValueError):  # the stream or the connection has ended
            self._h2.acknowledge_received_data(size, stream_id)

    async def _answer(self, stream_id: int, headers: Any, body: _RequestBody) -> None:
        # The client has reset the stream or disconnected, so that no error can be sent.
        with contextlib.suppress(h2.exceptions.ProtocolError, ConnectionError):
            await self._exchange(stream_id, headers, body)

    async def _exchange(self, stream_id: int, headers: Any, body: _RequestBody) -> None:
        try:
            stream = await self._dial()
        except (grpc.aio.AioRpcError, ConnectionError) as error:
            await self._send_head(stream_id, 502, [(b"content-type", b"text/plain")])
            await self._send_data(stream_id, unreachable_text(error), last=True)
            return
        try:
            await H1Exchange(stream).run(
                request_from_h2(headers), self._read_body(stream_id, body),
                lambda status, fields: self._send_head(stream_id, status, fields),
                lambda data, last: self._send_data(stream_id, data, last=last),
            )  # fmt: skip
        except (h11.ProtocolError, grpc.aio.AioRpcError, EOFError, asyncio.InvalidStateError):
            self._h2.reset_stream(stream_id, error_code=2)  # INTERNAL_ERROR
            await self._flush()
        finally:
            stream.close()

    async def _read_body(self, stream_id: int, body: _RequestBody) -> AsyncIterator[bytes]:
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
