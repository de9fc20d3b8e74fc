"""HTTPS server for exposed ports. The server name of the TLS handshake (SNI) selects the sandbox.

HTTP/1.1, WebSockets included, is not parsed: bytes are relayed to the port and back. HTTP/2 becomes one HTTP/1.1
request per stream, see `h2_ingress`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from pathlib import Path

import grpc

from agent.common.aio import cancel_and_wait
from agent.common.api_client import Api
from agent.common.ca import LocalCa, read_ca
from agent.common.config.addresses import split_address
from agent.common.config.gateway import GatewaySettings
from agent.common.errors import ConfigError
from agent.common.telemetry import log
from agent.gateway.ingress import h2_ingress
from agent.gateway.ingress.relay import READ_BYTES, relay
from agent.gateway.ingress.tls import server_context
from agent.gateway.metrics import INGRESS_CONNECTIONS
from agent.gateway.nodes.guest_stream import GuestStream
from agent.gateway.sandboxes.exposures import Exposure, Exposures
from sandboxd.v1 import network_pb2

_ALPN = ("h2", "http/1.1")
_HANDSHAKE_S = 10.0
_LISTEN_S = 30.0  # for an exposed process to start listening
_MAX_CONNECTIONS = 10_000
_HTTPS_PORT = 443
_BAD_GATEWAY = (
    b"HTTP/1.1 502 Bad Gateway\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
)


def _load_ca(directory: Path) -> LocalCa | None:
    """Return the CA that `sandboxctl ca create` made, or None without one.

    :raises ConfigError: its files are damaged.
    """
    try:
        return read_ca(directory)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the local CA in {directory} cannot be used: {error}; remove it and create a new one"
        ) from error


class Ingress:
    """Server of exposed ports. `port` is its TCP port, 0 before `start` and if it is off.

    :param api_of: returns the API of a node by its address.
    """

    def __init__(self, settings: GatewaySettings, exposures: Exposures, api_of: Callable[[str], Api | None]) -> None:
        self._settings = settings
        self._exposures = exposures
        self._api_of = api_of
        self.port = 0
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], str] = {}  # task -> sandbox id
        self._wildcard: ssl.SSLContext | None = None  # of gateway.ingress_cert
        self._ca: LocalCa | None = None

    @property
    def is_on(self) -> bool:
        """Whether ports can be exposed."""
        return self._server is not None

    def authority(self, name: str) -> str:
        """Return the authority of an exposure's URL: its host name, and the port unless it is 443."""
        port = self._settings.ingress_port or self.port
        host = self._exposures.host_name(name)
        return host if port == _HTTPS_PORT else f"{host}:{port}"

    async def start(self) -> None:
        """Start to serve, unless the address is empty or no certificate is configured.

        :raises ConfigError: a certificate or the local CA cannot be used.
        :raises OSError: the address cannot be bound.
        """
        settings = self._settings
        host, port = split_address(settings.ingress_address, "gateway.ingress_address")
        if not host:
            return
        if settings.ingress_cert:
            self._wildcard = server_context(settings.ingress_cert, settings.ingress_key, _ALPN, "gateway.ingress_cert")
        else:
            self._ca = _load_ca(settings.state_dir)
        context = self._wildcard or ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self._wildcard is None and self._ca is None:
            log.warning("ports cannot be exposed: no gateway.ingress_cert, and no CA: run `sandboxctl ca create`")
            return
        context.sni_callback = self._select_certificate
        self._server = await asyncio.start_server(
            self._on_connection, host, port, ssl=context, ssl_handshake_timeout=_HANDSHAKE_S, limit=READ_BYTES
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def aclose(self) -> None:
        """Stop the server and close its connections."""
        if self._server is not None:
            self._server.close()
        await cancel_and_wait(*self._connections)

    def close_sandbox(self, sandbox_id: str) -> None:
        """Close the connections to a sandbox. Idempotent."""
        for task, owner in self._connections.items():
            if owner == sandbox_id:
                task.cancel()

    def _select_certificate(self, connection: ssl.SSLObject, name: str | None, _first: ssl.SSLContext) -> int | None:
        """Set the certificate for a server name, or return an alert for an unknown one; called by OpenSSL."""
        if not name or self._exposures.find_host(name) is None:
            INGRESS_CONNECTIONS.labels("tls", "unknown_name").inc()
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        connection.context = self._wildcard or self._leaf(name.lower())
        connection.sandboxd_name = name  # type: ignore[attr-defined]  # ssl has no server name of a server's connection
        return None

    def _leaf(self, name: str) -> ssl.SSLContext:
        assert self._ca is not None
        return self._ca.context(name, _ALPN)

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection: ssl.SSLObject = writer.get_extra_info("ssl_object")
        exposure = self._exposures.find_host(_server_name(connection) or "")
        try:
            if exposure is not None and len(self._connections) < _MAX_CONNECTIONS:
                self._connections[task] = exposure.sandbox_id
                await self._serve(exposure, connection.selected_alpn_protocol() or "", reader, writer)
        except (ConnectionError, TimeoutError, ssl.SSLError, asyncio.CancelledError):
            pass  # the client disconnected, or the sandbox ended
        finally:
            self._connections.pop(task, None)
            writer.close()
            with contextlib.suppress(ConnectionError, TimeoutError, ssl.SSLError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _serve(
        self, exposure: Exposure, protocol: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if protocol == "h2":
            INGRESS_CONNECTIONS.labels("h2", "ok").inc()
            await h2_ingress.serve(reader, writer, lambda: self._dial(exposure))
            return
        try:
            stream = await self._dial(exposure)
        except (grpc.aio.AioRpcError, ConnectionError) as error:
            INGRESS_CONNECTIONS.labels("http/1.1", "not_reached").inc()
            text = h2_ingress.unreachable_text(error)
            writer.write(_BAD_GATEWAY % (len(text), text))
            await writer.drain()
            return
        INGRESS_CONNECTIONS.labels("http/1.1", "ok").inc()
        await relay(reader, writer, stream)

    async def _dial(self, exposure: Exposure) -> GuestStream:
        """Connect to the target of an exposure, on the guest's loopback.

        :raises grpc.aio.AioRpcError: the target does not listen.
        :raises ConnectionError: the exposure has no target yet, or its node is not configured any more.
        """
        api = self._api_of(exposure.node)
        if api is None or not (exposure.port or exposure.process_id):
            raise ConnectionError("nothing is exposed under this name yet")
        host, port = "127.0.0.1", exposure.port
        if exposure.process_id:
            found = await api.network.WaitForListener(
                network_pb2.WaitForListenerRequest(sandbox_id=exposure.sandbox_id, process_id=exposure.process_id),
                timeout=_LISTEN_S,
            )
            host, port = ("::1" if ":" in found.host else "127.0.0.1"), found.port
        try:
            return await GuestStream.dial(api, exposure.sandbox_id, host, port)
        except grpc.aio.AioRpcError:
            if exposure.process_id:
                raise
            return await GuestStream.dial(api, exposure.sandbox_id, "::1", port)  # a server that listens on IPv6 alone


def _server_name(connection: ssl.SSLObject) -> str | None:
    """Return the SNI of the client, which `_select_certificate` has checked."""
    name: str | None = getattr(connection, "sandboxd_name", None)
    return name
