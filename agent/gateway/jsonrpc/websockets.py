"""WebSocket handshakes of the SDKs: create a sandbox, or connect to one; then serve the socket."""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import web
from opentelemetry import trace

from agent.common.aio import cancel_and_wait
from agent.common.config.gateway import GatewaySettings
from agent.gateway.jsonrpc.connection import RpcConnection
from agent.gateway.jsonrpc.dispatch import MethodTable
from agent.gateway.jsonrpc.server import ConnectionLimits, ConnectionServer
from agent.gateway.metrics import CONNECTIONS
from agent.gateway.middleware import TOKEN
from agent.gateway.sandboxes.create_request import parse_config
from agent.gateway.sandboxes.lease import keep_alive
from agent.gateway.sandboxes.sandboxes import Sandboxes
from agent.gateway.sandboxes.session import Session

_CLOSE_S = 2.0


class WebSockets:
    """Handlers of both handshakes, and the open connections."""

    def __init__(self, settings: GatewaySettings, sandboxes: Sandboxes, methods: MethodTable) -> None:
        self._settings = settings
        self._sandboxes = sandboxes
        self._methods = methods
        self._open: set[RpcConnection] = set()

    def routes(self) -> list[web.RouteDef]:
        """Return the route table."""
        return [
            web.get("/api/v3/sandboxes/create", self.create),
            web.get("/api/v3/sandbox/{id}/connect", self.connect),
        ]

    async def create(self, request: web.Request) -> web.StreamResponse:
        """Create a sandbox and serve the connection; delete a sandbox without a fixed expiry afterwards."""
        token = request[TOKEN]
        config = parse_config(request.headers.get("x-deno-sandbox-config"))
        is_leased = config.expires_at() is None
        session = await self._sandboxes.create(config, token)
        renewing: asyncio.Task[None] | None = None
        upgraded = False
        try:
            ws = await self._upgrade(request, session)
            upgraded = True
            if is_leased:
                renewing = asyncio.create_task(keep_alive(session, token.max_lifetime_s))
            await self._serve(request, ws, session)
        finally:
            if renewing is not None:
                await cancel_and_wait(renewing)
            if not upgraded:
                self._sandboxes.abandon(session)
            elif is_leased:
                self._sandboxes.end_lease(session)
            self._sandboxes.release(session)
        return ws

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """Connect to a running sandbox and serve the connection."""
        session = await self._sandboxes.connect(request.match_info["id"], request[TOKEN].org)
        try:
            ws = await self._upgrade(request, session)
            await self._serve(request, ws, session)
        finally:
            self._sandboxes.release(session)
        return ws

    async def _upgrade(self, request: web.Request, session: Session) -> web.WebSocketResponse:
        # Compression costs more than it saves, and would let a few bytes expand into many.
        ws = web.WebSocketResponse(
            compress=False, max_msg_size=self._settings.max_message_bytes, timeout=_CLOSE_S, decode_text=False,
            receive_timeout=self._settings.idle_timeout_s,
        )  # fmt: skip
        ws.headers["x-deno-sandbox-id"] = session.sdk_id
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            ws.headers["x-deno-trace-id"] = trace.format_trace_id(context.trace_id)
        await ws.prepare(request)
        return ws

    async def _serve(self, request: web.Request, ws: web.WebSocketResponse, session: Session) -> None:
        limits = ConnectionLimits(self._settings.max_message_bytes, self._settings.spool_bytes)
        is_python = "websockets/" in request.headers.get("User-Agent", "")
        connection = RpcConnection(ws, session, is_python=is_python)
        self._open.add(connection)
        session.connections.add(connection)
        try:
            with CONNECTIONS.track_inprogress():
                await ConnectionServer(ws, connection, self._methods, limits).serve()
        finally:
            session.connections.discard(connection)
            self._open.discard(connection)

    async def close_all(self) -> None:
        """Close all connections: the gateway stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S * 2):
                await asyncio.gather(*(connection.close("the gateway stops") for connection in list(self._open)))
