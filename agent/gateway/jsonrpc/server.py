"""Receive loop of one client's WebSocket: calls run concurrently, within limits; stream events are applied in order.

Every byte of a client is untrusted: a malformed message gets an error response and does not end the connection.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import msgspec
from aiohttp import WSMsgType, web

from agent.common.telemetry import log
from agent.gateway.jsonrpc.connection import RpcConnection
from agent.gateway.jsonrpc.dispatch import MethodTable, run_call
from agent.gateway.jsonrpc.messages import (
    INVALID_REQUEST,
    PARSE_ERROR,
    STREAM_PREFIX,
    Message,
    decode_message,
    decode_stream_event,
)
from agent.gateway.metrics import BYTES

_MAX_CALLS = 4096


@dataclass(frozen=True)
class ConnectionLimits:
    """Bytes per connection beyond which no further message is read: of running calls' requests, of streams on disk."""

    message_bytes: int
    spool_bytes: int


class ConnectionServer:
    """Reads the messages of one connection and runs its calls."""

    def __init__(
        self, ws: web.WebSocketResponse, connection: RpcConnection, methods: MethodTable, limits: ConnectionLimits
    ) -> None:
        self._ws = ws
        self._connection = connection
        self._methods = methods
        self._limits = limits
        self._calls = 0
        self._request_bytes = 0  # of running calls
        self._pong_pending = False

    async def serve(self) -> None:
        """Serve the socket until either side closes it, or the client is idle; then release the connection.

        A live client is never idle: both SDKs send a message at least every 20 s.
        """
        try:
            async for message in self._ws:
                if message.type is WSMsgType.TEXT or message.type is WSMsgType.BINARY:
                    BYTES.labels("from_client").inc(len(message.data))
                    if message.data in ("ping", b"ping"):
                        self._answer_ping()
                    else:
                        self._handle(message.data)
                    del message  # frees a large message while the loop waits for the next one
                    await self._wait_for_room()
        except TimeoutError:
            log.info("client is silent, closing its connection", sandbox_id=self._connection.session.sandbox_id)
        finally:
            await self._connection.release()

    async def _wait_for_room(self) -> None:
        room = self._connection.room
        while self._is_full() and not self._ws.closed:
            room.clear()
            await room.wait()

    def _is_full(self) -> bool:
        return (
            self._calls >= _MAX_CALLS
            or self._request_bytes > self._limits.message_bytes
            or self._connection.streams.spooled_bytes > self._limits.spool_bytes
        )

    def _answer_ping(self) -> None:
        # One pending pong at most: a client that does not read must not fill the memory with them.
        if not self._pong_pending:
            self._pong_pending = True
            self._connection.spawn(self._send_pong())

    async def _send_pong(self) -> None:
        try:
            await self._connection.send_encoded(b"pong")
        finally:
            self._pong_pending = False

    def _handle(self, data: str | bytes) -> None:
        try:
            message = decode_message(data)
        except msgspec.ValidationError as error:
            self._reject(INVALID_REQUEST, f"not a JSON-RPC 2.0 request: {error}")
            return
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._reject(PARSE_ERROR, f"not JSON: {error}")
            return
        if message.id is not None:
            self._calls += 1
            self._request_bytes += len(data)
            self._connection.spawn(self._run_call(message, len(data)))
        elif message.method.startswith(STREAM_PREFIX):
            with contextlib.suppress(msgspec.DecodeError):  # a notification has no response to report it
                event = decode_stream_event(message.params)
                self._connection.streams.handle_event(message.method.removeprefix(STREAM_PREFIX), event)

    def _reject(self, code: int, text: str) -> None:
        self._connection.spawn(self._connection.send_error(None, code, text))

    async def _run_call(self, message: Message, request_bytes: int) -> None:
        try:
            await run_call(self._connection, self._methods, message)
        finally:
            self._calls -= 1
            self._request_bytes -= request_bytes
            self._connection.room.set()
