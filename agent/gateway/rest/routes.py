"""The REST side: sandboxes, and what is exposed of them. What is not ours to serve gets a clear 404."""

from __future__ import annotations

import ast
import re
from typing import TypeVar

import msgspec
from aiohttp import web

from agent.common.config.gateway import GatewaySettings
from agent.gateway.errors import Refusal
from agent.gateway.ingress.exposures import Exposures
from agent.gateway.ingress.ingress import Ingress
from agent.gateway.ingress.ssh import SshServer
from agent.gateway.jsonrpc.websockets import TOKEN
from agent.gateway.nodes.sandboxes import Sandboxes

_LABEL = re.compile(r"labels\[(.+)\]")
_MAX_FILTER = 4096


class _Extend(msgspec.Struct):
    stop_at_ms: int


_T = TypeVar("_T")


async def body_of(request: web.Request, kind: type[_T]) -> _T:
    """Returns the JSON body of a request. :raises Refusal: it is none of this kind."""
    try:
        return msgspec.json.decode(await request.read() or b"{}", type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refusal(400, "INVALID_BODY", f"the body is not the JSON that is expected: {error}") from None


def label_filter(query: dict[str, str]) -> dict[str, str]:
    """Returns the labels that are asked for: `labels[k]=v`, or one `labels` with a Python dict, as its SDK sends it.

    :raises Refusal: neither.
    """
    labels = {match[1]: value for name, value in query.items() if (match := _LABEL.fullmatch(name))}
    text = query.get("labels")
    if text:
        try:
            value = ast.literal_eval(text) if len(text) <= _MAX_FILTER else None
            labels |= msgspec.convert(value, dict[str, str])
        except (ValueError, SyntaxError, MemoryError, RecursionError, msgspec.ValidationError):
            raise Refusal(
                400, "INVALID_FILTER", f"labels={text[:80]!r} is not understood; write labels[key]=value"
            ) from None
    return labels


class Rest:
    """Handlers."""

    def __init__(
        self, settings: GatewaySettings, sandboxes: Sandboxes, exposures: Exposures, ingress: Ingress, ssh: SshServer
    ) -> None:
        self._settings = settings
        self._sandboxes = sandboxes
        self._exposures = exposures
        self._ingress = ingress
        self._ssh = ssh

    def routes(self) -> list[web.RouteDef]:
        """Returns the routes."""
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
        """The organization's sandboxes."""
        labels = label_filter(dict(request.query))
        return web.json_response(await self._sandboxes.list_of(request[TOKEN].org, labels))

    async def kill(self, request: web.Request) -> web.Response:
        """Ends a sandbox."""
        await self._sandboxes.kill(request.match_info["id"], request[TOKEN].org)
        return web.Response(status=204)

    async def extend(self, request: web.Request) -> web.Response:
        """Moves the end of a sandbox."""
        wanted = (await body_of(request, _Extend)).stop_at_ms
        granted = await self._sandboxes.extend(request.match_info["id"], request[TOKEN], wanted)
        return web.json_response({"stop_at_ms": granted})

    async def expose_http(self, request: web.Request) -> web.Response:
        """A domain for one of the sandbox's ports; the method exposeHttp says for which."""
        if not self._ingress.works:
            raise Refusal(
                501, "INGRESS_OFF", "this gateway exposes no ports: its operator must set gateway.ingress_address, and "
                "gateway.ingress_cert or run `sandboxctl ca create`",
            )  # fmt: skip
        link, found = await self._sandboxes.find(request.match_info["id"], request[TOKEN].org)
        name = self._exposures.reserve(found.id, link.address)
        return web.json_response({"domain": self._exposures.domain_of(name)})

    async def expose_ssh(self, request: web.Request) -> web.Response:
        """A user name for the SSH server."""
        if not self._ssh.port:
            raise Refusal(501, "SSH_OFF", "this gateway serves no SSH: its operator must set gateway.ssh_address")
        link, found = await self._sandboxes.find(request.match_info["id"], request[TOKEN].org)
        name = self._exposures.reserve(found.id, link.address, "ssh")
        answer = {"hostname": self._settings.ssh_hostname, "username": name, "port": self._ssh.port}
        return web.json_response(answer)
