"""HTTPS for exposed ports. The name that a client asks for in its TLS handshake (SNI) says which sandbox is meant.

HTTP/1.1, WebSockets included, is not looked into: bytes go to the port and back. HTTP/2 becomes one HTTP/1.1 request
per stream, see `ingress_http2`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from pathlib import Path

import grpc

from agent.common.aio import quietly
from agent.common.api_client import Api
from agent.common.ca import LocalCa, read_ca
from agent.common.config.gateway import GatewaySettings
from agent.common.config.settings import ConfigError, split_address
from agent.common.telemetry import log
from agent.gateway.ingress import h2_ingress
from agent.gateway.ingress.exposures import Exposure, Exposures
from agent.gateway.metrics import INGRESS_CONNECTIONS
from agent.gateway.nodes.guest_tcp import GuestStream, why
from sandboxd.v1 import network_pb2

_ALPN = ("h2", "http/1.1")
_READ_BYTES = 256 << 10
_HANDSHAKE_S = 10.0
_LISTEN_S = 30.0  # for an exposed process to begin to listen
_MAX_CONNECTIONS = 10_000
_BAD_GATEWAY = (
    b"HTTP/1.1 502 Bad Gateway\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
)


def _load_ca(directory: Path) -> LocalCa | None:
    """Returns the CA that `sandboxctl ca create` made; None if it has not. :raises ConfigError: it is damaged."""
    try:
        return read_ca(directory)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the local CA in {directory} cannot be used: {error}; remove it, and make another"
        ) from error


class Ingress:
    """The server of exposed ports.

    :param api_of: the API of a node, by its address.
    """

    def __init__(self, settings: GatewaySettings, exposures: Exposures, api_of: Callable[[str], Api | None]) -> None:
        self._settings = settings
        self._exposures = exposures
        self._api_of = api_of
        self.port = 0
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], str] = {}  # with the sandbox's id
        self._fixed: ssl.SSLContext | None = None
        self._ca: LocalCa | None = None

    @property
    def works(self) -> bool:
        """Whether ports can be exposed."""
        return self._server is not None

    async def start(self) -> None:
        """Begins to serve, if there is a certificate. :raises ConfigError: :raises OSError:"""
        settings = self._settings
        host, port = split_address(settings.ingress_address, "gateway.ingress_address")
        if not host:
            return
        if settings.ingress_cert:
            self._fixed = _context(settings.ingress_cert, settings.ingress_key)
        else:
            self._ca = _load_ca(settings.state_dir)
        first = self._fixed or ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self._fixed is None and self._ca is None:
            log.warning("ports cannot be exposed: no gateway.ingress_cert, and no CA: run `sandboxctl ca create`")
            return
        first.sni_callback = self._choose
        self._server = await asyncio.start_server(
            self._on_connection, host, port, ssl=first, ssl_handshake_timeout=_HANDSHAKE_S, limit=_READ_BYTES
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def aclose(self) -> None:
        """Ends the server and its connections."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await quietly(*self._connections)

    def end(self, sandbox_id: str) -> None:
        """Ends the connections to a sandbox that is gone."""
        for task, owner in self._connections.items():
            if owner == sandbox_id:
                task.cancel()

    def _choose(self, connection: ssl.SSLObject, name: str | None, _first: ssl.SSLContext) -> int | None:
        """Called by OpenSSL with the name of the hello; an unknown one is refused before anything is said."""
        if not name or self._exposures.find_host(name) is None:
            INGRESS_CONNECTIONS.labels("tls", "unknown_name").inc()
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        connection.context = self._fixed or self._leaf(name.lower())
        connection.sandboxd_name = name  # type: ignore[attr-defined]  # ssl tells a server's connection no name
        return None

    def _leaf(self, name: str) -> ssl.SSLContext:
        assert self._ca is not None
        return self._ca.context(name, _ALPN)

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection: ssl.SSLObject = writer.get_extra_info("ssl_object")
        name = _asked_name(connection)
        exposure = self._exposures.find_host(name or "")
        try:
            if exposure is not None and len(self._connections) < _MAX_CONNECTIONS:
                self._connections[task] = exposure.sandbox_id
                await self._serve(exposure, connection.selected_alpn_protocol() or "", reader, writer)
        except (ConnectionError, TimeoutError, ssl.SSLError, asyncio.CancelledError):
            pass  # the client is gone, or the sandbox is
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
            text = f"nothing answers in the sandbox: {why(error)}\n".encode()
            writer.write(_BAD_GATEWAY % (len(text), text))
            await writer.drain()
            return
        INGRESS_CONNECTIONS.labels("http/1.1", "ok").inc()
        await splice(reader, writer, stream)

    async def _dial(self, exposure: Exposure) -> GuestStream:
        """Connects to what is exposed, on the guest's loopback. :raises grpc.aio.AioRpcError:"""
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
            return await GuestStream.dial(api, exposure.sandbox_id, "::1", port)  # what listens on IPv6 alone


def _asked_name(connection: ssl.SSLObject) -> str | None:
    """Returns the name that the client asked for, which `_choose` has checked."""
    name: str | None = getattr(connection, "sandboxd_name", None)
    return name


def _context(certificate: str, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(list(_ALPN))
    try:
        context.load_cert_chain(certificate, key or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"gateway.ingress_cert {certificate} cannot be used: {error}") from error
    return context


async def splice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: GuestStream) -> None:
    """Carries bytes both ways until both sides have ended theirs. TLS has no half-close that clients use: the end of
    one direction of the client's is told to the guest, the guest's end closes the connection.
    """

    async def upstream() -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, ConnectionError):
            while data := await reader.read(_READ_BYTES):
                await stream.write(data)
            await stream.write_eof()

    sending = asyncio.create_task(upstream())
    try:
        with contextlib.suppress(grpc.aio.AioRpcError):
            while data := await stream.read():
                writer.write(data)
                await writer.drain()
    finally:
        sending.cancel()
        stream.close()
        await quietly(sending)
