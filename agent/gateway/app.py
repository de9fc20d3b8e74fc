"""The gateway as a whole: one HTTP server for WebSockets and REST, the ingress, SSH, and the nodes behind them."""

from __future__ import annotations

import secrets
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_address

import grpc
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import start_http_server

from agent.common.api_client import Api
from agent.common.background import Supervisor
from agent.common.config.gateway import GatewaySettings
from agent.common.config.settings import ConfigError, Settings, split_address
from agent.common.telemetry import log, tracer
from agent.common.tokens import TokenFile, TokenFileError
from agent.gateway.errors import Refusal, refusal_from_rpc
from agent.gateway.ingress.exposures import Exposures
from agent.gateway.ingress.ingress import Ingress
from agent.gateway.ingress.ssh import SshServer
from agent.gateway.jsonrpc.websockets import TOKEN, WebSockets
from agent.gateway.metrics import REFUSALS, registry
from agent.gateway.nodes.nodes import Nodes
from agent.gateway.nodes.sandboxes import Sandboxes
from agent.gateway.rest.routes import Rest
from agent.gateway.rest.volume_routes import VolumeRest

_MAX_BODY_BYTES = 1 << 20
_MAX_HEADER_BYTES = 128 << 10  # a create's config is a header


def _refused(refusal: Refusal) -> web.Response:
    REFUSALS.labels(refusal.code).inc()
    return web.json_response({"code": refusal.code, "message": refusal.message}, status=refusal.status)


def _guard(tokens: TokenFile) -> Middleware:
    """Returns what stands before every handler: who asks is known, and every refusal is JSON."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            scheme, _, text = request.headers.get("Authorization", "").partition(" ")
            token = tokens.check(text.strip()) if scheme.lower() == "bearer" else None
            if token is None:
                raise Refusal(401, "INVALID_TOKEN", "the token is missing, wrong, or was revoked")
            org = request.headers.get("X-Deno-Org")
            if org is not None and org != token.org:
                raise Refusal(403, "WRONG_ORG", f"the token is not for the organization {org[:64]!r}")
            request[TOKEN] = token
            with tracer.start_as_current_span(f"gateway {request.method}"):
                return await handler(request)
        except Refusal as refusal:
            return _refused(refusal)
        except grpc.aio.AioRpcError as error:
            return _refused(refusal_from_rpc(error))
        except TokenFileError as error:
            log.error("tokens cannot be read", error=error.message)
            return _refused(Refusal(500, error.reason, "the gateway cannot read its tokens; tell its operator"))
        except web.HTTPException as error:
            return _refused(_of_status(request, error))
        except Exception as error:  # noqa: BLE001  a defect of ours is told to our log, not to the client
            incident = secrets.token_hex(4)
            log.error("internal error", incident=incident, path=request.path, exc_info=error)
            return _refused(Refusal(500, "INTERNAL", f"internal error, incident {incident}: see the gateway's log"))

    return guard


def _of_status(request: web.Request, error: web.HTTPException) -> Refusal:
    if error.status == 404:
        where = f"{request.method} {request.path[:100]}"
        return Refusal(404, "NOT_SUPPORTED", f"{where} is not served by sandboxd: see docs/deno-sdk.md for what is")
    return Refusal(error.status, error.reason.upper().replace(" ", "_"), error.text or error.reason)


def _tls(settings: GatewaySettings) -> ssl.SSLContext | None:
    host, _ = split_address(settings.address, "gateway.address")
    if not settings.tls_cert:
        if host and host != "localhost" and not ip_address(host).is_loopback:
            raise ConfigError(f"gateway.address {settings.address} is not loopback; set gateway.tls_cert and tls_key")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"gateway.tls_cert {settings.tls_cert} cannot be used: {error}") from error
    return context


@asynccontextmanager
async def gateway(settings: Settings, supervisor: Supervisor) -> AsyncIterator[dict[str, int]]:
    """Runs the gateway; yields the ports of api, ingress and ssh. :raises ConfigError: :raises OSError:"""
    own = settings.gateway
    own.state_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
    host, port = split_address(own.address, "gateway.address")
    context = _tls(own)
    addresses = own.nodes or (f"unix:{settings.api.unix_socket or settings.paths.run_dir / 'sandboxd.sock'}",)
    async with AsyncExitStack() as stack:
        nodes = Nodes(addresses, own, supervisor, traced=bool(settings.tracing.otlp_endpoint))
        stack.push_async_callback(nodes.aclose)
        apis: dict[str, Api] = {link.address: link.api for link in nodes.links}
        exposures = Exposures(own.state_dir / "exposures.json", own.domain)
        exposures.load()
        volumes = VolumeRest(own, nodes)
        sandboxes = Sandboxes(own, nodes, exposures, volumes.find)
        stack.push_async_callback(sandboxes.settle)
        ingress, ssh = Ingress(own, exposures, apis.get), SshServer(own, exposures, apis.get)
        stack.push_async_callback(ingress.aclose)
        await ingress.start()
        exposures.port = own.ingress_port or ingress.port
        stack.push_async_callback(ssh.aclose)
        await ssh.start()
        sandboxes.on_gone += [ingress.end, ssh.end]
        nodes.start()
        websockets = WebSockets(own, sandboxes)
        app = web.Application(middlewares=[_guard(TokenFile(own.tokens_file))], client_max_size=_MAX_BODY_BYTES)
        app.add_routes([
            web.get("/api/v3/sandboxes/create", websockets.create),
            web.get("/api/v3/sandbox/{id}/connect", websockets.connect),
            *Rest(own, sandboxes, exposures, ingress, ssh).routes(),
            *volumes.routes(),
        ])  # fmt: skip
        runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=5.0, max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
        )  # fmt: skip
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        stack.push_async_callback(websockets.close_all)
        site = web.TCPSite(runner, host, port, ssl_context=context)
        await site.start()
        metrics_host, metrics_port = split_address(own.metrics_address, "gateway.metrics_address")
        if metrics_host:
            server, _thread = start_http_server(metrics_port, metrics_host, registry)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            metrics_port = server.server_port
        bound = runner.addresses[0][1]
        yield {"api": bound, "ingress": ingress.port, "ssh": ssh.port, "metrics": metrics_port}
