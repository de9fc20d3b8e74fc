"""Create sandboxes: check the token's quota, choose a node, and delete what a failed or cancelled create leaves."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import grpc

from agent.common.aio import TaskSet
from agent.common.config.gateway import GatewaySettings
from agent.common.telemetry import log, tracer
from agent.common.tokens import Token
from agent.gateway.errors import HttpError, http_error_from_rpc
from agent.gateway.nodes.nodes import Node, Nodes
from agent.gateway.nodes.volumes import Volumes
from agent.gateway.sandboxes.create_request import CreateConfig, create_request
from sandboxd.v1 import sandbox_pb2 as pb

_TRY_NEXT_NODE = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


async def delete(node: Node, sandbox_id: str) -> None:
    """Delete a sandbox; a failure is only logged, since the lease or the lifetime of the sandbox ends it later."""
    try:
        await node.api.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=sandbox_id, allow_missing=True))
    except grpc.aio.AioRpcError as error:
        log.warning("cannot delete sandbox", sandbox_id=sandbox_id, code=error.code().name)


class SandboxCreator:
    """Creates sandboxes on the nodes.

    :param background: runs deletes that must not wait for, or end with, the request that caused them.
    """

    def __init__(self, settings: GatewaySettings, nodes: Nodes, volumes: Volumes, background: TaskSet) -> None:
        self._settings = settings
        self._nodes = nodes
        self._volumes = volumes
        self._background = background
        self._creating: Counter[str] = Counter()  # by organization

    async def create(self, config: CreateConfig, token: Token) -> tuple[Node, pb.Sandbox]:
        """Create a sandbox and return it with its node. If cancelled, the sandbox is deleted in the background.

        :raises HttpError: the config is invalid, a quota is exceeded, or no node could create the sandbox.
        """
        request = create_request(config, token, self._settings.image, self._settings.vcpus)
        candidates = await self._nodes.candidates(config.region, token.regions)
        for name in (*request.volumes.values(), *([request.root] if request.root else [])):
            node = await self._volumes.node_of(name, token.org)
            candidates = [candidate for candidate in candidates if candidate is node]
        if not candidates:
            raise HttpError(400, "OTHER_REGION", "the volumes are not in the sandbox's region, or not all on one node")
        self._creating[token.org] += 1
        try:
            await self._check_quota(token)
            with tracer.start_as_current_span("gateway.create"):
                return await self._place(candidates, request)
        finally:
            self._creating[token.org] -= 1

    async def _check_quota(self, token: Token) -> None:
        if token.max_sandboxes:
            # A sandbox that is being created is counted by this gateway, so the nodes' CREATING ones are left out.
            listed = await self._nodes.list_sandboxes(token.org, {})
            count = sum(sandbox.state != pb.Sandbox.STATE_CREATING for sandbox in listed) + self._creating[token.org]
            if count > token.max_sandboxes:
                raise HttpError(429, "SANDBOX_QUOTA", f"this token allows {token.max_sandboxes} sandboxes at a time")

    async def _place(self, candidates: Sequence[Node], request: pb.CreateSandboxRequest) -> tuple[Node, pb.Sandbox]:
        failure: grpc.aio.AioRpcError | None = None
        for node in candidates:
            creating = asyncio.ensure_future(node.api.sandboxes.CreateSandbox(request))
            try:
                return node, await asyncio.shield(creating)
            except asyncio.CancelledError:
                self._background.spawn(_delete_created(node, creating))
                raise
            except grpc.aio.AioRpcError as error:
                failure = error
                if error.code() not in _TRY_NEXT_NODE:
                    break
        assert failure is not None
        raise http_error_from_rpc(failure)


async def _delete_created(node: Node, creating: asyncio.Future[pb.Sandbox]) -> None:
    try:
        created = await creating
    except grpc.aio.AioRpcError:
        return
    await delete(node, created.id)
