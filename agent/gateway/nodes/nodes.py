"""Clients of the nodes behind the gateway: one gRPC channel per node, node selection, and lookups over all nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from agent.common.api_client import KEEPALIVE, OPTIONS, Api, api_over
from agent.common.config.gateway import GatewaySettings
from agent.common.errors import ConfigError
from agent.common.telemetry import log, trace_headers
from agent.gateway.errors import HttpError
from sandboxd.v1 import node_pb2, sandbox_pb2

_TIMEOUT_S = 5.0
_PAGE_SIZE = 1000


@dataclass(eq=False)
class Node:
    """One node. `region` is empty until the node has answered once."""

    address: str
    channel: grpc.aio.Channel
    api: Api
    region: str = ""


class _TraceInterceptor(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Sends the W3C trace context of the current span with each unary call."""

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """Add trace headers to one call; called by grpc."""
        metadata = [*(client_call_details.metadata or ()), *trace_headers().items()]
        details = client_call_details._replace(metadata=grpc.aio.Metadata(*metadata))
        return await continuation(details, request)


def _channel(address: str, settings: GatewaySettings, *, traced: bool) -> grpc.aio.Channel:
    interceptors: Any = [_TraceInterceptor()] if traced else None  # the stubs do not allow None
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
    """All nodes of this gateway.

    :param addresses: "unix:/path" or "host:port".
    :param traced: send the trace context with each call, so that the nodes' spans join the gateway's traces.
    :raises ConfigError: a TCP address without a complete set of certificate files.
    """

    def __init__(self, addresses: Sequence[str], settings: GatewaySettings, *, traced: bool = False) -> None:
        self.members: list[Node] = []
        for address in addresses:
            channel = _channel(address, settings, traced=traced)
            self.members.append(Node(address, channel, api_over(channel)))

    async def aclose(self) -> None:
        """Close the channels."""
        for node in self.members:
            await node.channel.close(None)

    def api_of(self, address: str) -> Api | None:
        """Return the API of the node with this address, or None."""
        return next((node.api for node in self.members if node.address == address), None)

    async def candidates(self, region: str | None, allowed: Sequence[str]) -> list[Node]:
        """Return the nodes that may take a sandbox, ordered by allocatable memory, largest first.

        :param region: required region, or None for any region of `allowed`.
        :param allowed: regions of the token; empty means all.
        :raises HttpError: no node answers, or no node is in an allowed region.
        """
        described = await asyncio.gather(*(self._describe(node) for node in self.members))
        ready = [(node, facts) for node, facts in zip(self.members, described, strict=True) if facts is not None]
        if not ready:
            raise HttpError(503, "NO_NODE", "no node answers; try again later")
        regions = sorted({facts.region for _, facts in ready})
        fitting = [
            (node, facts)
            for node, facts in ready
            if (region is None or facts.region == region) and (not allowed or facts.region in allowed)
        ]
        if not fitting:
            asked = f"region {region!r} is" if region is not None else "the regions of this token are"
            raise HttpError(
                400, "REGION_NOT_AVAILABLE", f"{asked} not served here; available regions: {', '.join(regions)}"
            )
        fitting.sort(key=lambda pair: pair[1].memory_bytes.allocated - pair[1].memory_bytes.allocatable)
        return [node for node, _ in fitting]

    async def _describe(self, node: Node) -> node_pb2.Node | None:
        if len(self.members) == 1 and node.region:  # a single node needs no comparison of free memory
            return node_pb2.Node(region=node.region)
        try:
            facts = await node.api.nodes.GetNode(node_pb2.GetNodeRequest(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            log.warning("node does not answer", node=node.address, code=error.code().name)
            return None
        node.region = facts.region
        return facts

    async def find_sandbox(self, sandbox_id: str, org: str) -> tuple[Node, sandbox_pb2.Sandbox]:
        """Return a running sandbox of an organization and its node.

        :raises HttpError: 404, no node that answers has a running sandbox with this id in this organization.
        """

        async def get(node: Node) -> sandbox_pb2.Sandbox | None:
            try:
                request = sandbox_pb2.GetSandboxRequest(id=sandbox_id)
                return await node.api.sandboxes.GetSandbox(request, timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    log.warning("node does not answer", node=node.address, code=error.code().name)
                return None

        for node, found in zip(self.members, await asyncio.gather(*map(get, self.members)), strict=True):
            if found is not None and found.tenant == org and found.state == sandbox_pb2.Sandbox.STATE_RUNNING:
                return node, found
        raise HttpError(404, "SANDBOX_NOT_FOUND", "there is no such sandbox; it may have expired")

    async def list_sandboxes(self, org: str, labels: dict[str, str]) -> list[sandbox_pb2.Sandbox]:
        """Return the sandboxes of an organization on all nodes that have these labels, oldest first.

        :raises grpc.aio.AioRpcError: a node did not answer.
        """
        pages = await asyncio.gather(*(_list_node(node, org, labels) for node in self.members))
        found = [sandbox for page in pages for sandbox in page]
        return sorted(found, key=lambda sandbox: (sandbox.create_time.ToNanoseconds(), sandbox.id))


async def _list_node(node: Node, org: str, labels: dict[str, str]) -> list[sandbox_pb2.Sandbox]:
    found: list[sandbox_pb2.Sandbox] = []
    token = ""
    while True:
        request = sandbox_pb2.ListSandboxesRequest(tenant=org, labels=labels, page_size=_PAGE_SIZE, page_token=token)
        answer = await node.api.sandboxes.ListSandboxes(request, timeout=_TIMEOUT_S)
        found += answer.sandboxes
        token = answer.next_page_token
        if not token:
            return found
