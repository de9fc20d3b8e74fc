"""Run the gRPC server: services, credentials, addresses, health."""

from __future__ import annotations

import asyncio
import os
import socket
from ipaddress import ip_address
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from agent.common.background import QUICK, BackgroundLoop, Supervisor
from agent.common.config.addresses import split_address
from agent.common.config.daemon import ApiSettings
from agent.common.config.paths import Paths
from agent.common.config.settings import Settings
from agent.common.errors import ConfigError
from agent.daemon.rpc.auth.certificates import Certificates
from agent.daemon.rpc.auth.peercred import PeerSocket
from agent.daemon.rpc.interceptor import CallInterceptor
from agent.daemon.rpc.services.file_service import FileServicer
from agent.daemon.rpc.services.network_service import NetworkServicer
from agent.daemon.rpc.services.node_service import ImageServicer, NodeServicer
from agent.daemon.rpc.services.process_service import ProcessServicer
from agent.daemon.rpc.services.sandbox_service import SandboxServicer
from agent.daemon.rpc.services.template_service import TemplateServicer
from agent.daemon.rpc.services.volume_service import VolumeServicer
from agent.daemon.sandbox.service import SandboxService
from sandboxd.v1 import (
    file_pb2,
    file_pb2_grpc,
    network_pb2,
    network_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    process_pb2,
    process_pb2_grpc,
    sandbox_pb2,
    sandbox_pb2_grpc,
    volume_pb2,
    volume_pb2_grpc,
)

MAX_MESSAGE_BYTES = 8 << 20
BACKGROUND = "sandboxd.background"  # health service: NOT_SERVING while a background loop of the agent is failing
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)
_MODULES = (sandbox_pb2, process_pb2, file_pb2, network_pb2, node_pb2, volume_pb2)


class ApiServer:
    """Server of the API on the unix socket and, if configured, on TCP.

    :param listener: the listening unix socket, if the agent was started by socket activation.
    """

    def __init__(
        self,
        settings: Settings,
        sandboxes: SandboxService,
        supervisor: Supervisor,
        listener: socket.socket | None = None,
    ) -> None:
        self._settings = settings
        self.supervisor = supervisor
        self._health_loop: BackgroundLoop | None = None
        self._listener = listener
        self._certificates = Certificates(settings.api)
        self.sandboxes = sandboxes
        self._paths = Paths.of(settings)
        self._server = grpc.aio.server(interceptors=[CallInterceptor(audit=settings.log.audit)], options=_OPTIONS)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it
        self.tcp_port = 0
        self._peers = PeerSocket(
            self.socket_path,
            self._paths.private_socket,
            {0, os.getuid(), *settings.api.unix_allow_uids},
            settings.api.group_ids(),
        )
        self._add_services(sandboxes)

    @property
    def socket_path(self) -> Path:
        """The public unix socket."""
        return Path(self._settings.api.unix_socket or self._paths.run_dir / "sandboxd.sock")

    def _add_services(self, sandboxes: SandboxService) -> None:
        server = self._server
        sandbox_pb2_grpc.add_SandboxServiceServicer_to_server(SandboxServicer(sandboxes, self._settings), server)
        process_pb2_grpc.add_ProcessServiceServicer_to_server(ProcessServicer(sandboxes), server)
        file_pb2_grpc.add_FileServiceServicer_to_server(FileServicer(sandboxes), server)
        network_pb2_grpc.add_NetworkServiceServicer_to_server(NetworkServicer(sandboxes), server)
        node_pb2_grpc.add_NodeServiceServicer_to_server(NodeServicer(sandboxes), server)
        node_pb2_grpc.add_ImageServiceServicer_to_server(ImageServicer(sandboxes), server)
        node_pb2_grpc.add_TemplateServiceServicer_to_server(TemplateServicer(sandboxes, self._settings), server)
        volume_pb2_grpc.add_VolumeServiceServicer_to_server(VolumeServicer(sandboxes, self._settings), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [service.full_name for module in _MODULES for service in module.DESCRIPTOR.services_by_name.values()]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)

    async def start(self) -> None:
        """Start to serve.

        :raises ConfigError: an address or a certificate is not valid.
        :raises OSError: the unix socket cannot be bound.
        """
        private = self._paths.private_socket
        private.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        private.parent.chmod(0o700)
        private.unlink(missing_ok=True)
        self._server.add_insecure_port(f"unix:{private}")
        self._add_tcp(self._settings.api)
        await self._server.start()
        await self._peers.start(self._listener)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        self._health_loop = self.supervisor.start("health", self._keep_health, QUICK)

    async def _keep_health(self) -> None:
        """Serve the state of the background loops as the health of `BACKGROUND`.

        The server as a whole stays SERVING: calls work without most loops, and a load balancer that took the node out
        would help none of its sandboxes.
        """
        changed = asyncio.Event()
        self.supervisor.on_change.add(changed.set)
        try:
            while True:
                status = health_pb2.HealthCheckResponse
                await self._health.set(BACKGROUND, status.NOT_SERVING if self.supervisor.failing else status.SERVING)
                await changed.wait()
                changed.clear()
        finally:
            self.supervisor.on_change.discard(changed.set)

    def _add_tcp(self, api: ApiSettings) -> None:
        host, port = split_address(api.tcp_address, "api.tcp_address")
        if not host:
            return
        try:
            if api.tls_cert:
                self.tcp_port = self._server.add_secure_port(api.tcp_address, self._certificates.credentials())
            elif ip_address(host).is_loopback:
                self.tcp_port = self._server.add_insecure_port(api.tcp_address)
            else:
                raise ConfigError(f"api.tcp_address {api.tcp_address} is not loopback; set api.tls_* for mutual TLS")
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"cannot listen on api.tcp_address {host}:{port}: {error}") from error

    def reload_certificates(self) -> None:
        """Read the certificates again, for new connections; does nothing without TLS.

        :raises ConfigError: a file cannot be read; the certificates in use stay.
        """
        if self._settings.api.tls_cert:
            self._certificates.reload()

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, give calls `grace_s` seconds to end, then close. Idempotent."""
        if self._health_loop is not None:
            await self._health_loop.stop()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        await self._peers.aclose()
        self._paths.private_socket.unlink(missing_ok=True)
