"""The watch over the nodes' sandboxes, and the sessions that it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

from agent.common.aio import TaskSet
from agent.common.background import Supervisor
from agent.gateway.nodes.nodes import Node
from agent.gateway.nodes.watch import NodeWatch
from agent.gateway.sandboxes.exposures import Exposures
from agent.gateway.sandboxes.sandboxes import Sandboxes
from agent.gateway.sandboxes.session import Session
from sandboxd.v1.sandbox_pb2 import Sandbox, SandboxEvent
from tests.support.daemon_fakes import SilentObserver


class FakeService:
    """SandboxService of a node: each WatchSandboxes call yields these events, and stays open."""

    def __init__(self, *events: SandboxEvent) -> None:
        self.events = events

    async def WatchSandboxes(self, request: object) -> AsyncIterator[SandboxEvent]:  # noqa: N802  as in the API
        for event in self.events:
            yield event
        await asyncio.Event().wait()


def node(*events: SandboxEvent) -> Node:
    class Api:
        sandboxes = FakeService(*events)

    return Node("unix:/x", cast("Any", None), cast("Any", Api))


def event(kind: SandboxEvent.Type.ValueType, sandbox_id: str = "", **fields: Any) -> SandboxEvent:
    state = fields.pop("state", Sandbox.STATE_RUNNING)
    return SandboxEvent(type=kind, sandbox=Sandbox(id=sandbox_id, state=state), **fields)


async def test_ended_and_missing_sandboxes_are_reported() -> None:
    watched = node(
        event(SandboxEvent.TYPE_SNAPSHOT, "sbx-here"),
        event(SandboxEvent.TYPE_SYNCED),
        event(SandboxEvent.TYPE_DELETED, "sbx-here", state=Sandbox.STATE_DELETED, reason="expired"),
        event(SandboxEvent.TYPE_DENIED, "sbx-denied", state=Sandbox.STATE_FAILED),
        event(SandboxEvent.TYPE_UPDATED, "sbx-other", state=Sandbox.STATE_FAILED),
    )
    ended: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    async with Supervisor(SilentObserver()) as supervisor:
        watch = NodeWatch(
            [watched], supervisor, lambda _: {"sbx-here", "sbx-lost"}, lambda *facts: ended.put_nowait(facts)
        )
        watch.start()
        reports = [await asyncio.wait_for(ended.get(), 5) for _ in range(3)]
        await watch.aclose()
    assert reports == [("sbx-lost", "gone"), ("sbx-here", "expired"), ("sbx-other", "failed")]
    assert ended.empty()


async def test_a_node_is_watched_again_after_an_unexpected_error() -> None:
    watched = node(
        event(SandboxEvent.TYPE_SYNCED),
        event(SandboxEvent.TYPE_DELETED, "sbx-1", state=Sandbox.STATE_DELETED, reason="expired"),
    )
    ended: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    faults = [OSError(28, "No space left on device")]

    def on_ended(sandbox_id: str, reason: str) -> None:
        if faults:
            raise faults.pop()
        ended.put_nowait((sandbox_id, reason))

    async with Supervisor(SilentObserver()) as supervisor:
        watch = NodeWatch([watched], supervisor, lambda _: set(), on_ended)
        watch.start()
        assert await asyncio.wait_for(ended.get(), 10) == ("sbx-1", "expired")
        assert supervisor.failing == {"watch unix:/x": "OSError: [Errno 28] No space left on device"}
        await watch.aclose()
        assert supervisor.failing == {}


async def test_the_end_of_a_sandbox_closes_its_connections_and_forgets_its_names(tmp_path: Path) -> None:
    closed: list[str] = []

    class FakeConnection:
        async def close(self, reason: str) -> None:
            closed.append(reason)

    notified: list[str] = []
    exposures, background, here = Exposures(tmp_path / "x.json", "d"), TaskSet(), node()
    exposures.reserve("sbx-exposed", here.address)
    sandboxes = Sandboxes(
        cast("Any", None), cast("Any", None), exposures, background,
        on_ended=(exposures.remove_sandbox, notified.append),
    )  # fmt: skip
    session: Session = sandboxes._acquire(here, Sandbox(id="sbx-0123456789abcdef", region="loc"), "acme")
    session.connections.add(FakeConnection())
    assert sandboxes.known_on(here) == {"sbx-0123456789abcdef", "sbx-exposed"}
    assert sandboxes.known_on(node()) == {"sbx-exposed"}
    sandboxes.handle_end("sbx-exposed", "expired")
    sandboxes.handle_end("sbx-0123456789abcdef", "killed")
    await background.wait()
    assert notified == ["sbx-exposed", "sbx-0123456789abcdef"]
    assert closed == ["the sandbox is gone: killed"]
    assert session.ending
    sandboxes.release(session)
    assert sandboxes.known_on(here) == set()
