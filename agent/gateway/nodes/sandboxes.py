"""The sandboxes of the gateway's clients: created, found, kept alive as long as their session, ended."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import grpc
from tenacity import AsyncRetrying, retry_if_exception, wait_fixed

from agent.common.aio import quietly
from agent.common.api_client import opened
from agent.common.config.gateway import GatewaySettings
from agent.common.telemetry import log, tracer
from agent.common.tokens import Token
from agent.gateway.errors import Refusal, refusal_from_rpc
from agent.gateway.ingress.exposures import Exposures
from agent.gateway.jsonrpc.create_request import LEASE_S, CreateConfig, create_request
from agent.gateway.jsonrpc.session import Attachment
from agent.gateway.nodes.ids import from_sdk, to_sdk
from agent.gateway.nodes.nodes import NodeLink, Nodes
from sandboxd.v1 import sandbox_pb2 as pb

_RENEW_S = LEASE_S / 4
_RETRY_S = 1.0
_TRY_ANOTHER = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
_MAX_EXTENSION_S = 30 * 60


class Sandboxes:
    """All of them. `on_gone` callbacks are told the id of each sandbox that is no more."""

    def __init__(
        self, settings: GatewaySettings, nodes: Nodes, exposures: Exposures,
        node_of_volume: Callable[[str, str], Awaitable[NodeLink]],
    ) -> None:  # fmt: skip
        self._settings = settings
        self._nodes = nodes
        self._exposures = exposures
        self._node_of_volume = node_of_volume
        self._attachments: dict[str, Attachment] = {}
        self._creating: Counter[str] = Counter()  # by organization
        self._background: set[asyncio.Task[None]] = set()
        self.on_gone: list[Callable[[str], None]] = [exposures.drop]
        nodes.on_gone = self._gone
        nodes.is_watched = self._known_on

    def _known_on(self, link: NodeLink) -> set[str]:
        attached = {known.id for known in self._attachments.values() if known.link is link}
        return attached | self._exposures.sandboxes_on(link.address)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def settle(self) -> None:
        """Waits for deletes that are under way."""
        while self._background:
            await quietly(*self._background)

    def _gone(self, sandbox_id: str, reason: str) -> None:
        for tell in self.on_gone:
            tell(sandbox_id)
        attachment = self._attachments.get(sandbox_id)
        if attachment is not None:
            self._spawn(attachment.close(f"the sandbox is gone: {reason}"))

    # -- creating ------------------------------------------------------------------------------------------------------

    async def create(self, config: CreateConfig, token: Token) -> Attachment:
        """Creates a sandbox and attaches to it. :raises Refusal: it cannot be; nothing is left.

        The caller must `release` it.
        """
        request = create_request(config, token, self._settings.image, self._settings.vcpus)
        candidates = await self._nodes.candidates(config.region, token.regions)
        for name in (*request.volumes.values(), *([request.root] if request.root else [])):
            link = await self._node_of_volume(name, token.org)
            candidates = [candidate for candidate in candidates if candidate is link]
        if not candidates:
            raise Refusal(400, "OTHER_REGION", "the volumes are not in the sandbox's region, or not all on one node")
        self._creating[token.org] += 1
        try:
            await self._check_quota(token)
            with tracer.start_as_current_span("gateway.create"):
                link, created = await self._place(candidates, request)
        finally:
            self._creating[token.org] -= 1
        return self._attach(link, created, token.org)

    async def _check_quota(self, token: Token) -> None:
        if token.max_sandboxes:
            # What is being created is in both lists, but for a moment.
            listed = await self._nodes.sandboxes_of(token.org, {})
            held = sum(sandbox.state != pb.Sandbox.STATE_CREATING for sandbox in listed) + self._creating[token.org]
            if held > token.max_sandboxes:
                raise Refusal(429, "SANDBOX_QUOTA", f"this token allows {token.max_sandboxes} sandboxes at a time")

    async def _place(self, candidates: list[NodeLink], request: pb.CreateSandboxRequest) -> tuple[NodeLink, pb.Sandbox]:
        failure: grpc.aio.AioRpcError | None = None
        for link in candidates:
            creating = asyncio.ensure_future(link.api.sandboxes.CreateSandbox(request))
            try:
                return link, await asyncio.shield(creating)
            except asyncio.CancelledError:
                self._spawn(self._undo(link, creating))
                raise
            except grpc.aio.AioRpcError as error:
                failure = error
                if error.code() not in _TRY_ANOTHER:
                    break
        assert failure is not None
        raise refusal_from_rpc(failure)

    async def _undo(self, link: NodeLink, creating: asyncio.Future[pb.Sandbox]) -> None:
        """Ends a sandbox that nobody waits for any more."""
        try:
            created = await creating
        except grpc.aio.AioRpcError:
            return
        await self._delete(link, created.id)

    def _attach(self, link: NodeLink, found: pb.Sandbox, org: str) -> Attachment:
        attachment = self._attachments.get(found.id)
        if attachment is None:
            sdk_id = to_sdk(found.id, found.region)
            attachment = self._attachments[found.id] = Attachment(link, found.id, sdk_id, org, self._exposures)
        attachment.users += 1
        return attachment

    def release(self, attachment: Attachment) -> None:
        """Gives back what `create` or `attach` returned."""
        attachment.users -= 1
        if not attachment.users:
            self._attachments.pop(attachment.id, None)

    # -- using ---------------------------------------------------------------------------------------------------------

    async def find(self, sdk_id: str, org: str) -> tuple[NodeLink, pb.Sandbox]:
        """Returns a running sandbox, with its node. :raises Refusal: there is none that this organization may see."""
        sandbox_id = from_sdk(sdk_id)
        if sandbox_id is None:
            raise Refusal(404, "SANDBOX_NOT_FOUND", f"{sdk_id[:60]!r} is not a sandbox id")
        return await self._nodes.find(sandbox_id, org)

    async def attach(self, sdk_id: str, org: str) -> Attachment:
        """Returns a running sandbox for one more connection, which must `release` it. :raises Refusal:"""
        link, found = await self.find(sdk_id, org)
        return self._attach(link, found, org)

    async def extend(self, sdk_id: str, token: Token, stop_at_ms: int) -> int:
        """Moves the end of a sandbox, at most 30 minutes from now, and returns it. :raises Refusal:

        One that lived as long as its session lives until then instead.
        """
        link, found = await self.find(sdk_id, token.org)
        now = time.time()
        latest = now + _MAX_EXTENSION_S
        if token.max_lifetime_s:
            latest = min(latest, found.create_time.seconds + token.max_lifetime_s)
        until = min(stop_at_ms / 1000, latest)
        if until <= now:
            raise Refusal(400, "INVALID_TIMEOUT", "the new end is in the past, or beyond what the token allows")
        request = pb.UpdateSandboxRequest(id=found.id, end_lease=found.lifetime.HasField("lease"))
        request.expire_time.FromMilliseconds(round(until * 1000))
        try:
            updated = await link.api.sandboxes.UpdateSandbox(request)
        except grpc.aio.AioRpcError as error:
            raise refusal_from_rpc(error) from error
        return updated.expire_time.ToMilliseconds()

    async def list_of(self, org: str, labels: dict[str, str]) -> list[dict[str, object]]:
        """Returns what an organization is told of its sandboxes. :raises Refusal:"""
        try:
            found = await self._nodes.sandboxes_of(org, labels)
        except grpc.aio.AioRpcError as error:
            raise refusal_from_rpc(error) from error
        return [
            {
                "id": to_sdk(sandbox.id, sandbox.region), "createdAt": sandbox.create_time.ToJsonString(),
                "stoppedAt": None, "region": sandbox.region, "labels": dict(sandbox.labels),
                "status": "running" if sandbox.state == pb.Sandbox.STATE_RUNNING else "stopped",
            }
            for sandbox in found
        ]  # fmt: skip

    # -- ending --------------------------------------------------------------------------------------------------------

    async def kill(self, sdk_id: str, org: str) -> None:
        """Ends a sandbox and its connections. :raises Refusal: there is none, or it cannot be ended."""
        link, found = await self.find(sdk_id, org)
        attachment = self._attachments.get(found.id)
        if attachment is not None:
            attachment.ending = True
        try:
            await link.api.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=found.id, allow_missing=True))
        except grpc.aio.AioRpcError as error:
            if attachment is not None:
                attachment.ending = False
            raise refusal_from_rpc(error) from error
        self._gone(found.id, "killed")

    async def _delete(self, link: NodeLink, sandbox_id: str) -> None:
        try:
            await link.api.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=sandbox_id, allow_missing=True))
        except grpc.aio.AioRpcError as error:  # its lease, or its lifetime, ends it
            log.warning("sandbox not deleted", sandbox_id=sandbox_id, code=error.code().name)

    async def keep_alive(self, attachment: Attachment, max_lifetime_s: int) -> None:
        """Renew the lease of a session's sandbox until cancelled, or until it has none any more.

        :param max_lifetime_s: of the session, after which the sandbox is deleted; 0: no limit.
        """
        again = AsyncRetrying(retry=retry_if_exception(_may_come_back), wait=wait_fixed(_RETRY_S), reraise=True)
        try:
            async with asyncio.timeout(max_lifetime_s or None):
                await again(_renew, attachment)
        except grpc.aio.AioRpcError:
            return
        except TimeoutError:
            log.info("session is over by its token", sandbox_id=attachment.id)
            await self._delete(attachment.link, attachment.id)

    def end_session(self, attachment: Attachment) -> None:
        """Ends the sandbox of a session whose client has left, unless it was given another lifetime meanwhile."""
        self._spawn(self._end_session(attachment))

    async def _end_session(self, attachment: Attachment) -> None:
        try:
            found = await attachment.api.sandboxes.GetSandbox(pb.GetSandboxRequest(id=attachment.id))
        except grpc.aio.AioRpcError:
            return
        if found.lifetime.HasField("lease"):
            await self._delete(attachment.link, attachment.id)

    def abandon(self, attachment: Attachment) -> None:
        """Ends a sandbox that its creator never got to know."""
        self._spawn(self._delete(attachment.link, attachment.id))


async def _renew(attachment: Attachment) -> None:
    """Renew a lease over one stream for ever. :raises grpc.aio.AioRpcError: the stream has ended."""
    call = opened(attachment.api.sandboxes.KeepAlive)
    try:
        while True:
            await call.write(pb.KeepAliveRequest(id=attachment.id))
            await call.read()
            await asyncio.sleep(_RENEW_S)
    finally:
        call.cancel()


def _may_come_back(error: BaseException) -> bool:
    """Whether a lease can be renewed again later: its node is being restarted."""
    gone = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND)
    return isinstance(error, grpc.aio.AioRpcError) and error.code() not in gone
