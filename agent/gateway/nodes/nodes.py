"""The nodes behind the gateway: their channels, which one takes a new sandbox, and which sandboxes are gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from agent.common.api_client import KEEPALIVE, OPTIONS, Api, api_over
from agent.common.background import QUICK, BackgroundLoop, Supervisor
from agent.common.config.gateway import GatewaySettings
from agent.common.config.settings import ConfigError
from agent.common.telemetry import log, trace_headers
from agent.gateway.errors import Refusal
from sandboxd.v1 import node_pb2, sandbox_pb2

_RETRY_S = 1.0
_ANSWER_S = 5.0
_RUNNING = sandbox_pb2.Sandbox.STATE_RUNNING
_OVER = (
    sandbox_pb2.Sandbox.STATE_FAILED, sandbox_pb2.Sandbox.STATE_DELETING, sandbox_pb2.Sandbox.STATE_DELETED,
)  # fmt: skip


@dataclass(eq=False)
class NodeLink:
    """One node. `region` is empty until it has answered once."""

    address: str
    channel: grpc.aio.Channel
    api: Api
    region: str = ""


class _Traced(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Tells the node below which span of ours a call is."""

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """Called by grpc for each unary call."""
        metadata = [*(client_call_details.metadata or ()), *trace_headers().items()]
        details = client_call_details._replace(metadata=grpc.aio.Metadata(*metadata))
        return await continuation(details, request)


def _channel(address: str, settings: GatewaySettings, *, traced: bool) -> grpc.aio.Channel:
    interceptors: Any = [_Traced()] if traced else None  # the stubs do not know of None
    if address.startswith("unix:"):
        return grpc.aio.insecure_channel(address, options=OPTIONS, interceptors=interceptors)
    names = (settings.node_tls_ca, settings.node_tls_key, settings.node_tls_cert)
    if not all(names):
        raise ConfigError(f"gateway.nodes: {address} is on TCP and needs gateway.node_tls_ca, _cert and _key")
    try:
        ca, key, cert = (Path(name).read_bytes() for name in names)
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    return grpc.aio.secure_channel(address, credentials, options=(*OPTIONS, *KEEPALIVE), interceptors=interceptors)


class Nodes:
    """All nodes.

    :param traced: whether calls are spans of a trace that goes on in the node.
    :param on_gone: called with a sandbox's id and the reason once it is no more, or has failed.
    """

    def __init__(
        self, addresses: Sequence[str], settings: GatewaySettings, supervisor: Supervisor, *, traced: bool = False
    ) -> None:
        self._supervisor = supervisor
        self.links: list[NodeLink] = []
        for address in addresses:
            channel = _channel(address, settings, traced=traced)
            self.links.append(NodeLink(address, channel, api_over(channel)))
        self.on_gone: Callable[[str, str], None] = lambda _id, _reason: None
        self.is_watched: Callable[[NodeLink], set[str]] = lambda _link: set()
        self._watching: list[BackgroundLoop] = []

    def start(self) -> None:
        """Begins to watch the nodes' sandboxes."""
        self._watching = [
            self._supervisor.start(f"watch {link.address}", partial(self._watch, link), QUICK) for link in self.links
        ]

    async def aclose(self) -> None:
        """Ends the watch and closes the channels."""
        for loop in self._watching:
            await loop.stop()
        for link in self.links:
            await link.channel.close(None)

    async def candidates(self, region: str | None, allowed: Sequence[str]) -> list[NodeLink]:
        """Returns the nodes that may take a sandbox, that with the most free memory first.

        :param region: the one that was asked for; None: any of `allowed`, which is all if empty.
        :raises Refusal: no node is there, or none in this region.
        """
        described = await asyncio.gather(*(self._describe(link) for link in self.links))
        ready = [(link, node) for link, node in zip(self.links, described, strict=True) if node is not None]
        if not ready:
            raise Refusal(503, "NO_NODE", "no node answers; try again later")
        regions = sorted({node.region for _, node in ready})
        fitting = [
            (link, node)
            for link, node in ready
            if (region is None or node.region == region) and (not allowed or node.region in allowed)
        ]
        if not fitting:
            asked = f"region {region!r} is" if region is not None else "the regions of this token are"
            raise Refusal(400, "REGION_NOT_AVAILABLE", f"{asked} not served here; there are: {', '.join(regions)}")
        fitting.sort(key=lambda pair: pair[1].memory_bytes.allocated - pair[1].memory_bytes.allocatable)
        return [link for link, _ in fitting]

    async def _describe(self, link: NodeLink) -> node_pb2.Node | None:
        if len(self.links) == 1 and link.region:  # there is nothing to choose
            return node_pb2.Node(region=link.region)
        try:
            node = await link.api.nodes.GetNode(node_pb2.GetNodeRequest(), timeout=_ANSWER_S)
        except grpc.aio.AioRpcError as error:
            log.warning("node does not answer", node=link.address, code=error.code().name)
            return None
        link.region = node.region
        return node

    async def find(self, sandbox_id: str, org: str) -> tuple[NodeLink, sandbox_pb2.Sandbox]:
        """Returns a running sandbox of an organization, with its node. :raises Refusal: there is none."""

        async def ask(link: NodeLink) -> sandbox_pb2.Sandbox | None:
            try:
                request = sandbox_pb2.GetSandboxRequest(id=sandbox_id)
                return await link.api.sandboxes.GetSandbox(request, timeout=_ANSWER_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    log.warning("node does not answer", node=link.address, code=error.code().name)
                return None

        for link, found in zip(self.links, await asyncio.gather(*map(ask, self.links)), strict=True):
            if found is not None and found.tenant == org and found.state == _RUNNING:
                return link, found
        raise Refusal(404, "SANDBOX_NOT_FOUND", "there is no such sandbox; it may have expired")

    async def sandboxes_of(self, org: str, labels: dict[str, str]) -> list[sandbox_pb2.Sandbox]:
        """Returns the organization's sandboxes on all nodes, oldest first. :raises grpc.aio.AioRpcError:"""
        pages = await asyncio.gather(*(self._pages(link, org, labels) for link in self.links))
        found = [sandbox for page in pages for sandbox in page]
        return sorted(found, key=lambda sandbox: (sandbox.create_time.ToNanoseconds(), sandbox.id))

    async def _pages(self, link: NodeLink, org: str, labels: dict[str, str]) -> list[sandbox_pb2.Sandbox]:
        found: list[sandbox_pb2.Sandbox] = []
        token = ""
        while True:
            request = sandbox_pb2.ListSandboxesRequest(tenant=org, labels=labels, page_size=1000, page_token=token)
            answer = await link.api.sandboxes.ListSandboxes(request, timeout=_ANSWER_S)
            found += answer.sandboxes
            token = answer.next_page_token
            if not token:
                return found

    async def _watch(self, link: NodeLink) -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await self._follow(link)
            await asyncio.sleep(_RETRY_S)

    async def _follow(self, link: NodeLink) -> None:
        present: set[str] | None = set()
        async for event in link.api.sandboxes.WatchSandboxes(sandbox_pb2.WatchSandboxesRequest()):
            if event.type == sandbox_pb2.SandboxEvent.TYPE_SYNCED and present is not None:
                for sandbox_id in self.is_watched(link) - present:  # gone while we were not looking
                    self.on_gone(sandbox_id, "gone")
                present = None
            elif event.type == sandbox_pb2.SandboxEvent.TYPE_SNAPSHOT and present is not None:
                present.add(event.sandbox.id)
            if event.sandbox.state in _OVER and event.type != sandbox_pb2.SandboxEvent.TYPE_DENIED:
                self.on_gone(event.sandbox.id, event.reason or "failed")
