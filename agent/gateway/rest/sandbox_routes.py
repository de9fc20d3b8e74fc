"""REST routes of sandboxes: list, delete, extend, expose."""

from __future__ import annotations

import msgspec
from aiohttp import web

from agent.common.config.gateway import GatewaySettings
from agent.gateway.errors import HttpError
from agent.gateway.ingress.https_ingress import Ingress
from agent.gateway.ingress.ssh import SshServer
from agent.gateway.middleware import TOKEN
from agent.gateway.rest.requests import json_body, label_filter
from agent.gateway.sandboxes.exposures import Exposures
from agent.gateway.sandboxes.sandboxes import Sandboxes


class _Extend(msgspec.Struct):
    stop_at_ms: int


class SandboxRoutes:
    """Handlers of the routes."""

    def __init__(
        self, settings: GatewaySettings, sandboxes: Sandboxes, exposures: Exposures, ingress: Ingress, ssh: SshServer
    ) -> None:
        self._settings = settings
        self._sandboxes = sandboxes
        self._exposures = exposures
        self._ingress = ingress
        self._ssh = ssh

    def routes(self) -> list[web.RouteDef]:
        """Return the route table."""
        return [
            web.get("/api/v2/sandboxes", self.list_sandboxes),
            web.get("/api/v3/sandboxes", self.list_sandboxes),
            web.delete("/api/v3/sandbox/{id}", self.kill),
            web.delete("/api/v3/sandboxes/{id}", self.kill),
            web.patch("/api/v3/sandbox/{id}", self.extend),
            web.post("/api/v3/sandbox/{id}/expose/http", self.expose_http),
            web.post("/api/v3/sandbox/{id}/expose/vscode", self.expose_http),
            web.post("/api/v3/sandbox/{id}/expose/ssh", self.expose_ssh),
        ]

    async def list_sandboxes(self, request: web.Request) -> web.Response:
        """List the organization's sandboxes."""
        labels = label_filter(dict(request.query))
        return web.json_response(await self._sandboxes.list_json(request[TOKEN].org, labels))

    async def kill(self, request: web.Request) -> web.Response:
        """Delete a sandbox."""
        await self._sandboxes.kill(request.match_info["id"], request[TOKEN].org)
        return web.Response(status=204)

    async def extend(self, request: web.Request) -> web.Response:
        """Set the time of expiry of a sandbox; answer with the time that was granted."""
        requested = (await json_body(request, _Extend)).stop_at_ms
        granted = await self._sandboxes.extend(request.match_info["id"], request[TOKEN], requested)
        return web.json_response({"stop_at_ms": granted})

    async def expose_http(self, request: web.Request) -> web.Response:
        """Reserve a domain for a port of the sandbox; the JSON-RPC method exposeHttp sets the port."""
        if not self._ingress.is_on:
            raise HttpError(
                501, "INGRESS_OFF", "this gateway exposes no ports: its operator must set gateway.ingress_address, and "
                "gateway.ingress_cert or run `sandboxctl ca create`",
            )  # fmt: skip
        node, found = await self._sandboxes.find(request.match_info["id"], request[TOKEN].org)
        name = self._exposures.reserve(found.id, node.address)
        return web.json_response({"domain": self._ingress.authority(name)})

    async def expose_ssh(self, request: web.Request) -> web.Response:
        """Reserve a user name of the SSH server for the sandbox."""
        if not self._ssh.port:
            raise HttpError(501, "SSH_OFF", "this gateway serves no SSH: its operator must set gateway.ssh_address")
        node, found = await self._sandboxes.find(request.match_info["id"], request[TOKEN].org)
        name = self._exposures.reserve(found.id, node.address, "ssh")
        answer = {"hostname": self._settings.ssh_hostname, "username": name, "port": self._ssh.port}
        return web.json_response(answer)
