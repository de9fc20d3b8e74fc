"""Calls about sandboxes over the API's real socket, with a fake host behind it."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from sandboxd.v1 import sandbox_pb2
from tests.support.client import MIB
from tests.support.rpc_api import Api, failed


async def test_create_list_update_delete(api: Api) -> None:
    sandboxes = api.client.sandboxes
    ids = []
    for number in range(3):
        request = sandbox_pb2.CreateSandboxRequest(memory_bytes=64 * MIB, labels={"n": str(number), "all": "yes"})
        made = await sandboxes.CreateSandbox(request)
        assert made.state == sandbox_pb2.Sandbox.STATE_RUNNING
        assert [phase.name for phase in made.phases][-1] == "create"
        ids.append(made.id)
    page = await sandboxes.ListSandboxes(sandbox_pb2.ListSandboxesRequest(page_size=2, labels={"all": ""}))
    rest = await sandboxes.ListSandboxes(sandbox_pb2.ListSandboxesRequest(page_size=2, page_token=page.next_page_token))
    assert [found.id for found in [*page.sandboxes, *rest.sandboxes]] == ids
    assert rest.next_page_token == ""
    found = await sandboxes.ListSandboxes(sandbox_pb2.ListSandboxesRequest(labels={"n": "1"}))
    assert [one.id for one in found.sandboxes] == [ids[1]]
    await sandboxes.UpdateSandbox(
        sandbox_pb2.UpdateSandboxRequest(id=ids[0], set_labels={"x": "y"}, remove_labels=["n"])
    )
    assert (await sandboxes.GetSandbox(sandbox_pb2.GetSandboxRequest(id=ids[0]))).labels == {"all": "yes", "x": "y"}
    for sandbox_id in ids:
        await sandboxes.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=sandbox_id))
    assert api.node.left() == []
    await sandboxes.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=ids[0], allow_missing=True))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await sandboxes.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=ids[0]))
    failed(grpc.StatusCode.NOT_FOUND, "SANDBOX_NOT_FOUND", caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": "../x"}, "image name"),
        ({"vcpus": -1}, "vcpus is -1"),
        ({"memory_bytes": -1}, "memory_bytes is -1"),
        ({"memory_bytes": 64 * MIB + 1}, "multiple of 1 MiB"),
        ({"memory_bytes": 1 << 62}, "at most"),
        ({"disk_bytes": 1}, "disk_bytes is 1"),
        ({"disk_bytes": 1 << 62}, "disk_bytes is"),
        ({"env": {f"V{number}": "" for number in range(10_000)}}, "env has 10000 variables"),
        ({"env": {"A": "x" * (128 << 10)}}, "write a file"),
        ({"env": {"A=B": ""}}, "'='"),
        ({"env": {"A": "\0"}}, "NUL"),
        ({"labels": {"ä": ""}}, "label key"),
        ({"labels": {"a": "x" * 257}}, "256 bytes"),
        ({"labels": {f"l{number}": "" for number in range(65)}}, "65 labels"),
        ({"request_id": "a b"}, "request_id"),
        ({"lifetime": sandbox_pb2.Lifetime(duration=Duration(seconds=-1))}, "lifetime.duration"),
        ({"lifetime": sandbox_pb2.Lifetime(lease=Duration(nanos=1))}, "lifetime.lease"),
        ({"lifetime": sandbox_pb2.Lifetime(duration=Duration(seconds=1 << 60))}, "ten years"),
    ],
)
async def test_wrong_specs_are_refused_with_advice(api: Api, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await api.client.sandboxes.CreateSandbox(sandbox_pb2.CreateSandboxRequest(**fields))
    failed(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC", caught.value)
    assert message in (caught.value.details() or "")
    assert api.node.left() == []


async def test_absurd_times_and_tokens_are_refused(api: Api) -> None:
    async with api.client.sandbox(memory_bytes=64 * MIB) as made:
        for seconds in (-(1 << 62), 0, 1 << 62):
            request = sandbox_pb2.UpdateSandboxRequest(id=made.id)
            request.expire_time.seconds = seconds
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await api.client.sandboxes.UpdateSandbox(request)
            failed(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC", caught.value)
    for token in ("ä", "x", "eA=="):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.client.sandboxes.ListSandboxes(sandbox_pb2.ListSandboxesRequest(page_token=token))
        failed(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC", caught.value)


async def test_a_delete_during_a_create_is_told_to_its_caller(api: Api) -> None:
    api.node.world.hangs.add("dial")
    request = sandbox_pb2.CreateSandboxRequest(memory_bytes=64 * MIB)
    creating = asyncio.ensure_future(api.client.sandboxes.CreateSandbox(request))
    await api.node.world.reached["dial"].wait()
    (found,) = api.node.sandboxes.list()
    await api.client.sandboxes.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=found.id))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await creating
    failed(grpc.StatusCode.FAILED_PRECONDITION, "SANDBOX_DELETED", caught.value)
    assert api.node.left() == []


async def test_keep_alive_renews_and_its_end_deletes_nothing(api: Api) -> None:
    lease = sandbox_pb2.Lifetime(lease=Duration(seconds=60))
    async with api.client.sandbox(memory_bytes=64 * MIB, lifetime=lease) as made:
        call = api.client.sandboxes.KeepAlive()  # type: ignore[call-arg]  # the stubs know iterators alone
        await call.write(sandbox_pb2.KeepAliveRequest(id=made.id))
        first: Any = await call.read()
        await call.write(sandbox_pb2.KeepAliveRequest())
        second: Any = await call.read()
        assert second.expire_time.ToNanoseconds() > first.expire_time.ToNanoseconds()
        call.cancel()
        assert (await api.client.sandboxes.GetSandbox(sandbox_pb2.GetSandboxRequest(id=made.id))).id == made.id


async def test_watch_tells_what_happens(api: Api) -> None:
    call = api.client.sandboxes.WatchSandboxes(sandbox_pb2.WatchSandboxesRequest())
    first: Any = await call.read()
    assert first.type == sandbox_pb2.SandboxEvent.TYPE_SYNCED
    async with api.client.sandbox(memory_bytes=64 * MIB):
        pass
    kinds: list[Any] = [await call.read() for _ in range(4)]
    event = sandbox_pb2.SandboxEvent
    assert [kind.type for kind in kinds] == [
        event.TYPE_CREATED, event.TYPE_UPDATED, event.TYPE_UPDATED, event.TYPE_DELETED,
    ]  # fmt: skip
    assert kinds[-1].reason == "requested"
    call.cancel()


async def test_the_console_of_a_failed_sandbox(api: Api) -> None:
    async with api.client.sandbox(memory_bytes=64 * MIB) as made:
        api.node.world.vms[made.id].die()
        request = sandbox_pb2.GetConsoleRequest(id=made.id, follow=True)
        text = b"".join([piece.data async for piece in api.client.sandboxes.GetConsole(request)])
        assert b"Kernel panic" in text
