"""Watch the sandboxes of all nodes and report those that ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from functools import partial

import grpc

from agent.common.background import QUICK, BackgroundLoop, Supervisor
from agent.gateway.nodes.nodes import Node
from sandboxd.v1 import sandbox_pb2

_RETRY_S = 1.0
_ENDED = (
    sandbox_pb2.Sandbox.STATE_FAILED, sandbox_pb2.Sandbox.STATE_DELETING, sandbox_pb2.Sandbox.STATE_DELETED,
)  # fmt: skip


class NodeWatch:
    """One `WatchSandboxes` call per node, opened again after each failure.

    :param supervisor: runs one loop per node, and restarts a loop after an unexpected exception.
    :param known_on: returns the ids of the sandboxes that this gateway believes to be on a node.
    :param on_ended: called with the id of a sandbox and the reason once the sandbox is deleted or failed, and after a
        reconnect for each id of `known_on` that the node no longer has. May be called more than once per sandbox.
    """

    def __init__(
        self, nodes: Sequence[Node], supervisor: Supervisor, known_on: Callable[[Node], set[str]],
        on_ended: Callable[[str, str], None],
    ) -> None:  # fmt: skip
        self._nodes = nodes
        self._supervisor = supervisor
        self._known_on = known_on
        self._on_ended = on_ended
        self._loops: list[BackgroundLoop] = []

    def start(self) -> None:
        """Start one loop per node."""
        self._loops = [
            self._supervisor.start(f"watch {node.address}", partial(self._watch, node), QUICK) for node in self._nodes
        ]

    async def aclose(self) -> None:
        """Stop the loops."""
        for loop in self._loops:
            await loop.stop()

    async def _watch(self, node: Node) -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await self._follow(node)
            await asyncio.sleep(_RETRY_S)

    async def _follow(self, node: Node) -> None:
        present: set[str] | None = set()  # ids of the initial snapshot; None once it is complete
        async for event in node.api.sandboxes.WatchSandboxes(sandbox_pb2.WatchSandboxesRequest()):
            if event.type == sandbox_pb2.SandboxEvent.TYPE_SYNCED and present is not None:
                for sandbox_id in self._known_on(node) - present:  # ended while the watch was not connected
                    self._on_ended(sandbox_id, "gone")
                present = None
            elif event.type == sandbox_pb2.SandboxEvent.TYPE_SNAPSHOT and present is not None:
                present.add(event.sandbox.id)
            if event.sandbox.state in _ENDED and event.type != sandbox_pb2.SandboxEvent.TYPE_DENIED:
                self._on_ended(event.sandbox.id, event.reason or "failed")
