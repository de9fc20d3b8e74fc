"""Calls about processes over the API's real socket; guests and clients that send what they should not."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from agent.common.errors import GuestError, GuestUnreachable
from guest.wire import Frame
from sandboxd.v1 import network_pb2, process_pb2
from tests.support.client import MIB
from tests.support.rpc_api import EXITED, ID, PROCESS, Api, exec_messages, failed


async def test_exec_carries_both_ways(api: Api) -> None:
    api.node.world.script = [
        (Frame.EVENT, {"process": PROCESS}), 2, (Frame.STDOUT, b"out"), (Frame.STDERR, b"err"), (Frame.RESULT, EXITED),
    ]  # fmt: skip
    async with api.client.sandbox(memory_bytes=64 * MIB) as made:
        result = await api.client.run(made.id, "cat", stdin=b"in")
    assert (result.stdout, result.stderr, result.code) == (b"out", b"err", 3)
    (stream,) = api.node.world.streams
    assert stream.sent == [("DATA", b"in"), ("EOF", b"")]


@pytest.mark.parametrize(
    ("answer", "code", "why"),
    [
        ((Frame.RESULT, {}), grpc.StatusCode.UNAVAILABLE, "GUEST_MALFORMED"),
        ((Frame.RESULT, {"exit": {"code": 1 << 40, "signal": 0, "signal_name": ""}}), grpc.StatusCode.UNAVAILABLE,
         "GUEST_MALFORMED"),
        ((Frame.EVENT, {"process": {**PROCESS, "argv": "x"}}), grpc.StatusCode.UNAVAILABLE, "GUEST_MALFORMED"),
        ((Frame.EVENT, {"process": {**PROCESS, "pid": True}}), grpc.StatusCode.UNAVAILABLE, "GUEST_MALFORMED"),
        (GuestError("bad \ud800 \udcff", reason="EXEC_NOT_FOUND"), grpc.StatusCode.FAILED_PRECONDITION,
         "EXEC_NOT_FOUND"),
        (GuestUnreachable("gone"), grpc.StatusCode.UNAVAILABLE, "GUEST_UNREACHABLE"),
    ],
)  # fmt: skip
async def test_a_guest_that_answers_wrongly_is_a_typed_error(
    api: Api, answer: Any, code: grpc.StatusCode, why: str
) -> None:
    api.node.world.script = [answer]
    async with api.client.sandbox(memory_bytes=64 * MIB) as made:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.client.run(made.id, "x")
    failed(code, why, caught.value)


async def test_text_that_is_not_utf8_is_replaced(api: Api) -> None:
    api.node.world.script = [
        (Frame.EVENT, {"process": {**PROCESS, "cwd": "/\udcff", "user": "\ud800"}}), (Frame.RESULT, EXITED),
    ]  # fmt: skip
    async with api.client.sandbox(memory_bytes=64 * MIB) as made:
        responses = [one async for one in api.client.processes.Exec(exec_messages(made.id))]
    assert (responses[0].process.cwd, responses[0].process.user) == ("/\ufffd", "?")


async def test_a_wrong_message_in_mid_stream_ends_the_call_with_its_reason(api: Api) -> None:
    api.node.world.script = [(Frame.EVENT, {"process": PROCESS}), 5]
    wrong = process_pb2.ExecRequest(resize=process_pb2.Terminal(rows=-1, cols=1))
    async with api.client.sandbox(memory_bytes=64 * MIB) as made:
        call = api.client.processes.Exec(exec_messages(made.id, wrong))
        await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call.read(), 2)
    failed(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC", caught.value)


async def test_a_malformed_message_in_mid_stream_ends_a_dialled_connection(api: Api) -> None:
    api.node.world.script = [(Frame.EVENT, {}), 5]
    async with api.client.sandbox(memory_bytes=64 * MIB) as made:
        opening = network_pb2.DialRequest(open=network_pb2.DialRequest.Open(sandbox_id=made.id, port=80))
        # The stubs describe the blocking API; without serializers, messages are bytes.
        call = api.channel.stream_stream("/sandboxd.v1.NetworkService/Dial")()  # type: ignore[call-arg]
        await call.write(opening.SerializeToString())
        await call.read()
        await call.write(b"\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call.read(), 2)
    failed(grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST", caught.value)


async def test_a_client_that_leaves_ends_the_guests_call(api: Api) -> None:
    api.node.world.script = [(Frame.EVENT, {"process": PROCESS}), 5]
    async with api.client.sandbox(memory_bytes=64 * MIB) as made:
        call = api.client.processes.Exec(exec_messages(made.id))
        await call.read()
        call.cancel()
        async with asyncio.timeout(2):
            await api.node.world.streams[0].ended.wait()


@pytest.mark.parametrize(
    "spec",
    [
        {"argv": []},
        {"argv": [""]},
        {"argv": ["x"] * 4097},
        {"argv": ["x\0"]},
        {"argv": ["x" * (1 << 20)]},
        {"argv": ["x"], "cwd": "\0"},
        {"argv": ["x"], "cwd": "/" * 5000},
        {"argv": ["x"], "replay_bytes": -1},
        {"argv": ["x"], "terminal": process_pb2.Terminal(rows=70000)},
    ],
)
async def test_wrong_process_specs_are_refused(api: Api, spec: dict[str, Any]) -> None:
    request = process_pb2.StartProcessRequest(sandbox_id=ID, spec=process_pb2.ProcessSpec(**spec))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await api.client.processes.StartProcess(request)
    failed(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC", caught.value)
