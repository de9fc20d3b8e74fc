"""Errors, the node, health and reflection, over the API's real socket."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from agent.common.background import Backoff
from agent.common.errors import GuestError, GuestUnreachable, NotFound
from agent.common.telemetry import ERRORS
from agent.daemon.rpc import status
from agent.daemon.rpc.convert.guest_values import guest_float, guest_int
from sandboxd.v1 import node_pb2, sandbox_pb2
from tests.support.client import MIB
from tests.support.rpc_api import ID, Api, failed


async def test_what_nobody_expected_is_hidden_behind_an_incident(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(sandbox_id: str) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(api.node.sandboxes, "inspect", broken)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await api.client.sandboxes.GetSandbox(sandbox_pb2.GetSandboxRequest(id=ID))
    failed(grpc.StatusCode.INTERNAL, "INTERNAL", caught.value)
    assert "secret" not in (caught.value.details() or "")
    assert "incident" in (caught.value.details() or "")


def test_long_messages_keep_beginning_and_end() -> None:
    _, made = status.to_status(NotFound("begin " + "x" * 10_000 + " end"))
    assert made.details.startswith("begin")
    assert made.details.endswith(" end")
    assert len(made.details) < 3100


def test_words_of_guests_do_not_fill_the_metrics() -> None:
    for number in range(1000):
        status.to_status(GuestError("x", reason=f"WORD_{number}"))
    assert len(next(iter(ERRORS.collect())).samples) < 1000


def test_every_error_of_ours_has_a_code() -> None:
    for kind in status.CODES:
        assert status.code_of(kind("x")) is status.CODES[kind]


def test_numbers_of_guests_are_checked() -> None:
    for value in (None, "1", True, -1, 1 << 70, 1.5):
        with pytest.raises(GuestUnreachable):
            guest_int({"n": value}, "n")
    for number in (None, "1", True, float("nan"), float("inf")):
        with pytest.raises(GuestUnreachable):
            guest_float({"n": number}, "n")


async def test_the_node_and_its_changes(api: Api) -> None:
    node = await api.client.nodes.GetNode(node_pb2.GetNodeRequest())
    assert (node.vmm, node.accelerator, node.state) == ("fake", "tcg", node_pb2.Node.STATE_READY)
    assert [image.name for image in node.images] == ["minimal"]
    call = api.client.nodes.WatchNode(node_pb2.WatchNodeRequest(interval_seconds=3600))
    first: Any = await call.read()
    assert first.sandboxes.allocated == 0
    async with api.client.sandbox(memory_bytes=64 * MIB), asyncio.timeout(2):
        later: Any = await call.read()
        while later.sandboxes.allocated != 1:
            later = await call.read()
    call.cancel()


async def test_health_and_the_node_tell_of_a_loop_that_fails_until_it_has_recovered(api: Api) -> None:
    healed = asyncio.Event()

    async def loop() -> None:
        if not healed.is_set():
            raise RuntimeError("can't start new thread")
        await asyncio.Event().wait()

    status = health_pb2.HealthCheckResponse
    health = health_pb2_grpc.HealthStub(api.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service="sandboxd.background"))
    nodes: Any = api.client.nodes.WatchNode(node_pb2.WatchNodeRequest(interval_seconds=3600))
    async with asyncio.timeout(10):
        assert (await watch.read()).status == status.SERVING
        assert (await nodes.read()).degraded == []
        failing = api.node.supervisor.start("drop-counters", loop, Backoff(0.01, 0.01, settle_s=0.3))
        assert (await watch.read()).status == status.NOT_SERVING
        (sentence,) = (await nodes.read()).degraded
        assert "drop-counters fails" in sentence
        assert "can't start new thread" in sentence
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == status.SERVING
        healed.set()
        assert (await watch.read()).status == status.SERVING
        while (await nodes.read()).degraded:
            pass
    await failing.stop()
    watch.cancel()
    nodes.cancel()


async def test_health_and_reflection(api: Api) -> None:
    health = health_pb2_grpc.HealthStub(api.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(api.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    response = await call.read()
    names = {service.name for service in response.list_services_response.service}
    assert {"sandboxd.v1.SandboxService", "sandboxd.v1.FileService", "grpc.health.v1.Health"} <= names
    call.cancel()
