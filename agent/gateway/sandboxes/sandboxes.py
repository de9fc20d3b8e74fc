"""Sandboxes of the gateway's clients: sessions, lookup, listing, expiry and deletion."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import grpc

from agent.common.aio import TaskSet
from agent.common.tokens import Token
from agent.gateway.errors import HttpError, http_error_from_rpc
from agent.gateway.nodes.nodes import Node, Nodes
from agent.gateway.sandboxes.create_request import CreateConfig
from agent.gateway.sandboxes.creation import SandboxCreator, delete
from agent.gateway.sandboxes.exposures import Exposures
from agent.gateway.sandboxes.ids import from_sdk, to_sdk
from agent.gateway.sandboxes.lease import delete_if_leased
from agent.gateway.sandboxes.session import Session
from sandboxd.v1 import sandbox_pb2 as pb

_MAX_EXTENSION_S = 30 * 60


class Sandboxes:
    """All sandboxes of all clients. A `Session` exists while clients are connected to its sandbox.

    :param background: runs deletes and the closing of sockets; its owner waits for it when the gateway stops.
    :param on_ended: called with the id of each sandbox that ended, perhaps more than once.
    """

    def __init__(
        self, nodes: Nodes, creator: SandboxCreator, exposures: Exposures, background: TaskSet,
        on_ended: Sequence[Callable[[str], None]],
    ) -> None:  # fmt: skip
        self._nodes = nodes
        self._creator = creator
        self._exposures = exposures
        self._background = background
        self._on_ended = tuple(on_ended)
        self._sessions: dict[str, Session] = {}  # by sandbox id

    def known_on(self, node: Node) -> set[str]:
        """Return the ids of the sandboxes on a node that have a session or an exposure."""
        connected = {session.sandbox_id for session in self._sessions.values() if session.node is node}
        return connected | self._exposures.sandboxes_on(node.address)

    def handle_end(self, sandbox_id: str, reason: str) -> None:
        """Close the connections of a sandbox that ended, and notify `on_ended`. Idempotent."""
        for notify in self._on_ended:
            notify(sandbox_id)
        session = self._sessions.get(sandbox_id)
        if session is not None:
            self._background.spawn(session.close(f"the sandbox is gone: {reason}"))

    # -- sessions ------------------------------------------------------------------------------------------------------

    async def create(self, config: CreateConfig, token: Token) -> Session:
        """Create a sandbox and return its session, which the caller must `release`.

        :raises HttpError: the sandbox could not be created; none is left.
        """
        node, created = await self._creator.create(config, token)
        return self._acquire(node, created, token.org)

    async def connect(self, sdk_id: str, org: str) -> Session:
        """Return the session of a running sandbox, which the caller must `release`.

        :raises HttpError: 404, the organization has no such running sandbox.
        """
        node, found = await self.find(sdk_id, org)
        return self._acquire(node, found, org)

    def _acquire(self, node: Node, found: pb.Sandbox, org: str) -> Session:
        session = self._sessions.get(found.id)
        if session is None:
            sdk_id = to_sdk(found.id, found.region)
            session = self._sessions[found.id] = Session(node, found.id, sdk_id, org, self._exposures)
        session.users += 1
        return session

    def release(self, session: Session) -> None:
        """Release a session that `create` or `connect` returned; the last release drops it."""
        session.users -= 1
        if not session.users:
            self._sessions.pop(session.sandbox_id, None)

    # -- requests ------------------------------------------------------------------------------------------------------

    async def find(self, sdk_id: str, org: str) -> tuple[Node, pb.Sandbox]:
        """Return a running sandbox of an organization and its node.

        :raises HttpError: 404, there is none with this id.
        """
        sandbox_id = from_sdk(sdk_id)
        if sandbox_id is None:
            raise HttpError(404, "SANDBOX_NOT_FOUND", f"{sdk_id[:60]!r} is not a sandbox id")
        return await self._nodes.find_sandbox(sandbox_id, org)

    async def extend(self, sdk_id: str, token: Token, stop_at_ms: int) -> int:
        """Set the time of expiry, at most 30 minutes from now; return it in milliseconds since 1970.

        A sandbox with the lifetime of its client's connection gets this fixed time instead.

        :raises HttpError: there is no such sandbox, or the time is in the past or beyond the token's limit.
        """
        node, found = await self.find(sdk_id, token.org)
        now = time.time()
        latest = now + _MAX_EXTENSION_S
        if token.max_lifetime_s:
            latest = min(latest, found.create_time.seconds + token.max_lifetime_s)
        expiry_time = min(stop_at_ms / 1000, latest)
        if expiry_time <= now:
            raise HttpError(400, "INVALID_TIMEOUT", "the new end is in the past, or beyond what the token allows")
        request = pb.UpdateSandboxRequest(id=found.id, end_lease=found.lifetime.HasField("lease"))
        request.expire_time.FromMilliseconds(round(expiry_time * 1000))
        try:
            updated = await node.api.sandboxes.UpdateSandbox(request)
        except grpc.aio.AioRpcError as error:
            raise http_error_from_rpc(error) from error
        return updated.expire_time.ToMilliseconds()

    async def list_json(self, org: str, labels: dict[str, str]) -> list[dict[str, object]]:
        """Return the sandboxes of an organization that have these labels, in the SDKs' form.

        :raises HttpError: a node did not answer.
        """
        try:
            found = await self._nodes.list_sandboxes(org, labels)
        except grpc.aio.AioRpcError as error:
            raise http_error_from_rpc(error) from error
        return [
            {
                "id": to_sdk(sandbox.id, sandbox.region), "createdAt": sandbox.create_time.ToJsonString(),
                "stoppedAt": None, "region": sandbox.region, "labels": dict(sandbox.labels),
                "status": "running" if sandbox.state == pb.Sandbox.STATE_RUNNING else "stopped",
            }
            for sandbox in found
        ]  # fmt: skip

    async def kill(self, sdk_id: str, org: str) -> None:
        """Delete a sandbox and close its connections.

        :raises HttpError: there is no such running sandbox, or its node did not delete it.
        """
        node, found = await self.find(sdk_id, org)
        session = self._sessions.get(found.id)
        if session is not None:
            session.ending = True
        try:
            await node.api.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=found.id, allow_missing=True))
        except grpc.aio.AioRpcError as error:
            if session is not None:
                session.ending = False
            raise http_error_from_rpc(error) from error
        self.handle_end(found.id, "killed")

    # -- deletion after a disconnect -----------------------------------------------------------------------------------

    def end_lease(self, session: Session) -> None:
        """Delete the sandbox of a client that disconnected, in the background, unless it has a fixed expiry by now."""
        self._background.spawn(delete_if_leased(session))

    def abandon(self, session: Session) -> None:
        """Delete a sandbox whose id the client never received, in the background."""
        self._background.spawn(delete(session.node, session.sandbox_id))
