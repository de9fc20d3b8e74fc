"""Composition root of the gateway: builds and starts its servers, and stops them in reverse order."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_address

from aiohttp import web
from prometheus_client import start_http_server

from agent.common.aio import TaskSet
from agent.common.background import Supervisor
from agent.common.config.addresses import split_address
from agent.common.config.gateway import GatewaySettings
from agent.common.config.settings import Settings
from agent.common.errors import ConfigError
from agent.common.tokens import TokenFile
from agent.gateway.ingress.https_ingress import Ingress
from agent.gateway.ingress.ssh import SshServer
from agent.gateway.ingress.tls import server_context
from agent.gateway.jsonrpc.websockets import WebSockets
from agent.gateway.methods.table import METHODS
from agent.gateway.metrics import registry
from agent.gateway.middleware import guard
from agent.gateway.nodes.nodes import Nodes
from agent.gateway.nodes.volumes import Volumes
from agent.gateway.nodes.watch import NodeWatch
from agent.gateway.rest.sandbox_routes import SandboxRoutes
from agent.gateway.rest.volume_routes import VolumeRoutes
from agent.gateway.sandboxes.creation import SandboxCreator
from agent.gateway.sandboxes.exposures import Exposures
from agent.gateway.sandboxes.sandboxes import Sandboxes

_MAX_BODY_BYTES = 1 << 20
_MAX_HEADER_BYTES = 128 << 10  # the config of a create is a header
_SHUTDOWN_S = 5.0


@asynccontextmanager
async def gateway(settings: Settings, supervisor: Supervisor) -> AsyncIterator[dict[str, int]]:
    """Run the gateway; yield the TCP ports of "api", "ingress", "ssh" and "metrics", 0 for a server that is off.

    :param supervisor: runs the background loops.
    :raises ConfigError: a setting, a certificate or a key cannot be used.
    :raises OSError: an address cannot be bound, or the state directory cannot be made.
    """
    own = settings.gateway
    own.state_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
    api_tls = api_tls_context(own)
    addresses = own.nodes or (f"unix:{settings.api.unix_socket or settings.paths.run_dir / 'sandboxd.sock'}",)
    async with AsyncExitStack() as stack:
        nodes = Nodes(addresses, own, traced=bool(settings.tracing.otlp_endpoint))
        stack.push_async_callback(nodes.aclose)
        exposures = Exposures(own.state_dir / "exposures.json", own.domain)
        exposures.load()
        background = TaskSet()
        stack.push_async_callback(background.wait)
        ingress = Ingress(own, exposures, nodes.api_of)
        stack.push_async_callback(ingress.aclose)
        await ingress.start()
        ssh = SshServer(own, exposures, nodes.api_of)
        stack.push_async_callback(ssh.aclose)
        await ssh.start()
        volumes = Volumes(nodes)
        sandboxes = Sandboxes(
            nodes, SandboxCreator(own, nodes, volumes, background), exposures, background,
            on_ended=(exposures.remove_sandbox, ingress.close_sandbox, ssh.close_sandbox),
        )  # fmt: skip
        watch = NodeWatch(nodes.members, supervisor, sandboxes.known_on, sandboxes.handle_end)
        stack.push_async_callback(watch.aclose)
        watch.start()
        websockets = WebSockets(own, sandboxes, METHODS)
        app = web.Application(middlewares=[guard(TokenFile(own.tokens_file))], client_max_size=_MAX_BODY_BYTES)
        app.add_routes([
            *websockets.routes(),
            *SandboxRoutes(own, sandboxes, exposures, ingress, ssh).routes(),
            *VolumeRoutes(own, nodes, volumes).routes(),
        ])  # fmt: skip
        api_port = await _serve(app, own, api_tls, stack, websockets)
        yield {"api": api_port, "ingress": ingress.port, "ssh": ssh.port, "metrics": _serve_metrics(own, stack)}


def api_tls_context(settings: GatewaySettings) -> ssl.SSLContext | None:
    """Return the TLS context of the API, or None for plain HTTP on loopback.

    :raises ConfigError: the address is not loopback and has no certificate, or the certificate cannot be used.
    """
    host, _ = split_address(settings.address, "gateway.address")
    if not settings.tls_cert:
        if host and host != "localhost" and not ip_address(host).is_loopback:
            raise ConfigError(f"gateway.address {settings.address} is not loopback; set gateway.tls_cert and tls_key")
        return None
    return server_context(settings.tls_cert, settings.tls_key, ["http/1.1"], "gateway.tls_cert")


async def _serve(
    app: web.Application, settings: GatewaySettings, tls: ssl.SSLContext | None, stack: AsyncExitStack,
    websockets: WebSockets,
) -> int:  # fmt: skip
    """Serve the API until the stack closes; return its port. Open WebSockets are closed first."""
    host, port = split_address(settings.address, "gateway.address")
    runner = web.AppRunner(
        app, access_log=None, shutdown_timeout=_SHUTDOWN_S, max_line_size=_MAX_HEADER_BYTES,
        max_field_size=_MAX_HEADER_BYTES,
    )  # fmt: skip
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    stack.push_async_callback(websockets.close_all)
    await web.TCPSite(runner, host, port, ssl_context=tls).start()
    bound: int = runner.addresses[0][1]
    return bound


def _serve_metrics(settings: GatewaySettings, stack: AsyncExitStack) -> int:
    """Serve the metrics until the stack closes, unless their address is empty; return their port."""
    host, port = split_address(settings.metrics_address, "gateway.metrics_address")
    if not host:
        return port
    server, _thread = start_http_server(port, host, registry)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    return server.server_port
