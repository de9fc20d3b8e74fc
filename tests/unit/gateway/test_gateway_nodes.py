"""The gateway's watch over a node goes on after any failure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

from agent.common.api_client import Api
from agent.common.background import Supervisor
from agent.common.config.gateway import GatewaySettings
from agent.gateway.nodes.nodes import Nodes
from sandboxd.v1 import sandbox_pb2
from tests.support.daemon_fakes import SilentObserver


class FakeSandboxes:
    """A node that tells every watcher of one deleted sandbox."""

    async def WatchSandboxes(self, _: Any) -> AsyncIterator[sandbox_pb2.SandboxEvent]:  # noqa: N802
        yield sandbox_pb2.SandboxEvent(type=sandbox_pb2.SandboxEvent.TYPE_SYNCED)
        gone = sandbox_pb2.Sandbox(id="sbx-1", state=sandbox_pb2.Sandbox.STATE_DELETED)
        yield sandbox_pb2.SandboxEvent(type=sandbox_pb2.SandboxEvent.TYPE_DELETED, sandbox=gone, reason="expired")
        await asyncio.Event().wait()


async def test_a_node_is_watched_again_after_an_unexpected_error() -> None:
    told: list[tuple[str, str]] = []
    faults = [OSError(28, "No space left on device")]

    def on_gone(sandbox_id: str, reason: str) -> None:
        if faults:
            raise faults.pop()
        told.append((sandbox_id, reason))

    observer = SilentObserver()
    async with Supervisor(observer) as supervisor:
        nodes = Nodes(["unix:/nowhere"], GatewaySettings(), supervisor)
        nodes.links[0].api = cast(Api, SimpleNamespace(sandboxes=FakeSandboxes()))
        nodes.on_gone = on_gone
        nodes.start()
        async with asyncio.timeout(10):
            while not told:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert told == [("sbx-1", "expired")]
        assert supervisor.failing == {"watch unix:/nowhere": "OSError: [Errno 28] No space left on device"}
        await nodes.aclose()
        assert supervisor.failing == {}
