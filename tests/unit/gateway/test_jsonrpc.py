"""The JSON-RPC server over a fake socket: dispatch, errors, aborts, limits, and the end of a connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, cast

from aiohttp import WSMessage, WSMsgType

from agent.gateway.errors import CallError
from agent.gateway.jsonrpc.connection import RpcConnection
from agent.gateway.jsonrpc.dispatch import Method
from agent.gateway.jsonrpc.messages import Params
from agent.gateway.jsonrpc.server import ConnectionLimits, ConnectionServer
from agent.gateway.sandboxes.session import Session

LIMITS = ConnectionLimits(1 << 20, 1 << 20)


class FakeSocket:
    """A WebSocket whose client is the test. `sent` are the messages to the client."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.received: asyncio.Queue[str | None] = asyncio.Queue()
        self.changed = asyncio.Event()
        self.closed = False

    def __aiter__(self) -> FakeSocket:
        return self

    async def __anext__(self) -> WSMessage:
        data = await self.received.get()
        if data is None:
            self.closed = True
            raise StopAsyncIteration
        return WSMessage(WSMsgType.TEXT, data, None)

    async def send_frame(self, data: bytes, kind: WSMsgType) -> None:
        self.sent.append(data.decode() if data == b"pong" else json.loads(data))
        self.changed.set()

    def client_sends(self, message: object) -> None:
        self.received.put_nowait(message if isinstance(message, str) else json.dumps(message))

    def client_calls(self, request_id: int, method: str, **params: object) -> None:
        self.client_sends({"jsonrpc": "2.0", "id": request_id, "method": method, "params": params})

    async def answer(self, request_id: int | None) -> Any:
        while True:
            for message in self.sent:
                if isinstance(message, dict) and message.get("id", 0) == request_id:
                    return message
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 5)


class Text(Params):
    text: str
    abort_id: int | None = None


async def echo(connection: RpcConnection, params: Text) -> object:
    return params.text


async def fail(connection: RpcConnection, params: Text) -> object:
    raise CallError("NotFound", params.text, code="ENOENT")


async def crash(connection: RpcConnection, params: Text) -> object:
    raise ZeroDivisionError


async def sleep(connection: RpcConnection, params: Text) -> object:
    await asyncio.Event().wait()
    return None


METHODS = {name: Method(Text, handler) for name, handler in (("echo", echo), ("fail", fail), ("crash", crash))}
METHODS["sleep"] = Method(Text, sleep)


class Client:
    """A served connection; leaving it disconnects the client."""

    def __init__(
        self, methods: Mapping[str, Method] = METHODS, limits: ConnectionLimits = LIMITS, *, is_python: bool = False
    ) -> None:
        self.socket = FakeSocket()
        ws = cast("Any", self.socket)
        session = Session(cast("Any", None), "sbx-1", "sbx_loc_1", "acme", cast("Any", None))
        self.connection = RpcConnection(ws, session, is_python=is_python)
        self._server = ConnectionServer(ws, self.connection, methods, limits)

    async def __aenter__(self) -> Client:
        self._task = asyncio.create_task(self._server.serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.socket.received.put_nowait(None)
        await asyncio.wait_for(self._task, 5)


async def test_results_and_errors() -> None:
    async with Client() as client:
        client.socket.client_calls(1, "echo", text="hi")
        client.socket.client_calls(2, "fail", text="gone")
        assert (await client.socket.answer(1))["result"] == {"ok": "hi"}
        error = (await client.socket.answer(2))["result"]["error"]
        assert (error["constructorName"], error["message"], error["code"]) == ("NotFound", "gone", "ENOENT")


async def test_wrong_requests_get_errors_and_do_not_end_the_connection() -> None:
    async with Client() as client:
        client.socket.client_calls(1, "no such method")
        client.socket.client_calls(2, "echo", text=5)
        client.socket.client_calls(3, "crash", text="")
        assert (await client.socket.answer(1))["error"]["code"] == -32601
        invalid = (await client.socket.answer(2))["error"]
        assert (invalid["code"], invalid["data"]["constructorName"]) == (-32602, "ZodError")
        internal = (await client.socket.answer(3))["error"]
        assert internal["code"] == -32603
        assert "ZeroDivision" not in internal["message"]
        client.socket.client_sends("{")
        assert (await client.socket.answer(None))["error"]["code"] == -32700
        client.socket.sent.clear()
        client.socket.client_sends([])
        assert (await client.socket.answer(None))["error"]["code"] == -32600
        client.socket.client_calls(4, "echo", text="alive")
        assert (await client.socket.answer(4))["result"] == {"ok": "alive"}


async def test_a_ping_is_answered() -> None:
    async with Client() as client:
        client.socket.client_sends("ping")
        client.socket.client_calls(1, "echo", text="x")
        await client.socket.answer(1)
        assert "pong" in client.socket.sent


async def test_an_aborted_call_fails_and_another_with_its_id_does_not() -> None:
    async with Client() as client:
        client.socket.client_calls(1, "sleep", text="", abortId=7)
        client.socket.client_calls(2, "echo", text="x")
        await client.socket.answer(2)
        client.connection.abort(7)
        client.connection.abort(8)
        assert (await client.socket.answer(1))["result"]["error"]["name"] == "AbortError"
        client.socket.client_calls(3, "echo", text="again", abortId=7)
        assert (await client.socket.answer(3))["result"] == {"ok": "again"}


async def test_a_result_that_the_python_sdk_cannot_receive_becomes_an_error() -> None:
    async with Client(limits=ConnectionLimits(1 << 22, 1), is_python=True) as client:
        client.socket.client_calls(1, "echo", text="x" * (1 << 20))
        assert (await client.socket.answer(1))["result"]["error"]["code"] == "EFBIG"


async def test_no_message_is_read_while_the_requests_of_running_calls_fill_the_limit() -> None:
    async with Client(limits=ConnectionLimits(1000, 1000)) as client:
        client.socket.client_calls(1, "sleep", text="x" * 2000, abortId=1)
        client.socket.client_calls(2, "echo", text="next")
        for _ in range(10):
            await asyncio.sleep(0)
        assert client.socket.received.qsize() == 1
        client.connection.abort(1)
        assert (await client.socket.answer(2))["result"] == {"ok": "next"}


async def test_no_message_is_read_while_spooled_bytes_fill_the_limit() -> None:
    async with Client(limits=ConnectionLimits(1 << 23, 1 << 20)) as client:
        data = "A" * (4 << 20)  # 3 MiB in base64, more than stays in memory
        event = {"method": "$sandbox.stream.enqueue", "params": {"streamId": 5, "data": data}}
        client.socket.client_sends({"method": "$sandbox.stream.start", "params": {"streamId": 5}})
        client.socket.client_sends(event)
        client.socket.client_calls(1, "echo", text="next")
        for _ in range(10):
            await asyncio.sleep(0)
        assert client.socket.received.qsize() == 1
        assert client.connection.streams.spooled_bytes == 3 << 20
        async with client.connection.streams.inbound(5) as stream:
            while client.connection.streams.spooled_bytes:
                await stream.read()
        assert (await client.socket.answer(1))["result"] == {"ok": "next"}


async def test_a_client_that_disconnects_ends_its_calls_streams_and_files() -> None:
    class File:
        closed = False

        def close(self) -> None:
            self.closed = True

    file, errors = File(), []
    async with Client() as client:
        connection = client.connection
        connection.open_files[1] = cast("Any", file)
        client.socket.client_calls(1, "sleep", text="")

        async def read() -> None:
            async with connection.streams.inbound(3) as stream:
                try:
                    await stream.read()
                except CallError as error:
                    errors.append(error.kind)

        reading = asyncio.create_task(read())
        await asyncio.sleep(0)
    await reading
    assert errors == ["ConnectionAborted"]
    assert file.closed
    assert client.socket.sent == []


async def test_only_the_oldest_unclaimed_stream_is_dropped() -> None:
    async with Client() as client:
        for number in range(4097):
            client.socket.client_sends({"method": "$sandbox.stream.start", "params": {"streamId": number}})
        client.socket.client_sends({"method": "$sandbox.stream.enqueue", "params": {"streamId": 1, "data": "eA=="}})
        client.socket.client_calls(1, "echo", text="x")
        await client.socket.answer(1)
        async with client.connection.streams.inbound(1) as stream:
            assert await stream.read() == b"x"
