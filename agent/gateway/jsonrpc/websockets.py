"""The two WebSocket handshakes: create and connect."""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import web
from opentelemetry import trace

from agent.common.aio import quietly
from agent.common.config.gateway import GatewaySettings
from agent.common.tokens import Token
from agent.gateway.jsonrpc.connection import Connection, Limits
from agent.gateway.jsonrpc.create_request import parse_config
from agent.gateway.jsonrpc.session import Attachment

# Each of these enters its methods.
from agent.gateway.methods import deno, environment, exposing, fetch, file_io, files, open_files, processes, walk  # noqa: F401
from agent.gateway.metrics import CONNECTIONS
from agent.gateway.nodes.sandboxes import Sandboxes

TOKEN: web.RequestKey[Token] = web.RequestKey("token", Token)
_CLOSE_S = 2.0


class WebSockets:
    """Handlers of both."""

    def __init__(self, settings: GatewaySettings, sandboxes: Sandboxes) -> None:
        self._settings = settings
        self._sandboxes = sandboxes
        self._open: set[Connection] = set()

    async def create(self, request: web.Request) -> web.StreamResponse:
        """GET /api/v3/sandboxes/create"""
        token = request[TOKEN]
        config = parse_config(request.headers.get("x-deno-sandbox-config"))
        is_session = config.lives_until() is None
        attachment = await self._sandboxes.create(config, token)
        keeping: asyncio.Task[None] | None = None
        served = False
        try:
            ws = await self._upgrade(request, attachment)
            served = True
            if is_session:
                keeping = asyncio.create_task(self._sandboxes.keep_alive(attachment, token.max_lifetime_s))
            await self._serve(request, ws, attachment)
        finally:
            if keeping is not None:
                keeping.cancel()
                await quietly(keeping)
            if not served:
                self._sandboxes.abandon(attachment)
            elif is_session:
                self._sandboxes.end_session(attachment)
            self._sandboxes.release(attachment)
        return ws

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """GET /api/v3/sandbox/{id}/connect"""
        attachment = await self._sandboxes.attach(request.match_info["id"], request[TOKEN].org)
        try:
            ws = await self._upgrade(request, attachment)
            await self._serve(request, ws, attachment)
        finally:
            self._sandboxes.release(attachment)
        return ws

    async def _upgrade(self, request: web.Request, attachment: Attachment) -> web.WebSocketResponse:
        # Compression would cost more than it saves, and let a few bytes become many.
        ws = web.WebSocketResponse(
            compress=False, max_msg_size=self._settings.max_message_bytes, timeout=_CLOSE_S, decode_text=False,
            receive_timeout=self._settings.idle_timeout_s,
        )  # fmt: skip
        ws.headers["x-deno-sandbox-id"] = attachment.sdk_id
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            ws.headers["x-deno-trace-id"] = trace.format_trace_id(context.trace_id)
        await ws.prepare(request)
        return ws

    async def _serve(self, request: web.Request, ws: web.WebSocketResponse, attachment: Attachment) -> None:
        limits = Limits(self._settings.max_message_bytes, self._settings.spool_bytes)
        is_python = "websockets/" in request.headers.get("User-Agent", "")
        connection = Connection(ws, attachment, limits, is_python=is_python)
        self._open.add(connection)
        attachment.connections.add(connection)
        try:
            with CONNECTIONS.track_inprogress():
                await connection.serve()
        finally:
            attachment.connections.discard(connection)
            self._open.discard(connection)

    async def close_all(self) -> None:
        """Closes every connection, when the gateway ends."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S * 2):
                await asyncio.gather(*(connection.close("the gateway stops") for connection in list(self._open)))
