"""A client of the gateway that does what an SDK would not: raw WebSocket frames and REST, one by one."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from sandboxd.v1 import sandbox_pb2
from tests.support.daemon import connected
from tests.support.gateway import ORG, Gateway

MEMORY_MB = 768


def config_header(**config: Any) -> dict[str, str]:
    text = json.dumps({"memory_mb": MEMORY_MB, **config}).encode()
    return {"x-deno-sandbox-config": base64.b64encode(text).decode()}


@dataclass
class Socket:
    """One WebSocket. `calls` are answered out of order; stream notifications are kept by stream id."""

    ws: aiohttp.ClientWebSocketResponse
    sandbox_id: str
    streams: dict[int, bytearray] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    _answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    _next: int = 1 << 52  # beyond the ids that a test makes up

    async def send(self, value: Any) -> None:
        await self.ws.send_str(value if isinstance(value, str) else json.dumps(value))

    async def request(self, method: str, **params: Any) -> int:
        self._next += 1
        await self.send({"jsonrpc": "2.0", "id": self._next, "method": method, "params": params})
        return self._next

    async def receive(self) -> dict[str, Any]:
        """Returns the next message; takes note of streams."""
        message = await self.ws.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise ConnectionError(f"{message.type} {message.data} {message.extra}")
        if message.data == "pong":
            return {"pong": True}
        value: dict[str, Any] = json.loads(message.data)
        if value.get("method", "").startswith("$sandbox.stream."):
            stream = value["params"]["streamId"]
            if value["method"].endswith("enqueue"):
                self.streams.setdefault(stream, bytearray()).extend(base64.b64decode(value["params"]["data"]))
            elif value["method"].endswith("end"):
                self.ended.add(stream)
        elif "id" in value and value["id"] is not None:
            self._answers[value["id"]] = value
        return value

    async def answer(self, request_id: int) -> dict[str, Any]:
        while request_id not in self._answers:
            await self.receive()
        return self._answers.pop(request_id)

    async def call(self, method: str, **params: Any) -> Any:
        """Returns the value of "ok"."""
        answer = await self.answer(await self.request(method, **params))
        assert "ok" in answer.get("result", {}), answer
        return answer["result"]["ok"]

    async def fail(self, method: str, **params: Any) -> dict[str, Any]:
        """Returns the error object."""
        answer = await self.answer(await self.request(method, **params))
        error: dict[str, Any] = answer["result"]["error"]
        return error

    async def alive(self) -> None:
        """Returns once a ping is answered."""
        await self.send("ping")
        async with asyncio.timeout(20):
            while not (await self.receive()).get("pong"):
                pass

    async def run(self, *argv: str) -> str:
        """Returns the output of a program."""
        started = await self.call("spawn", command=argv[0], args=list(argv[1:]), stdout="piped", stderr="null")
        await self.call("processWait", pid=started["pid"])
        stream = started["stdoutStreamId"]
        while stream not in self.ended:
            await self.receive()
        return self.streams.pop(stream, bytearray()).decode()


class RawClient:
    """REST and WebSockets with one token."""

    def __init__(self, session: aiohttp.ClientSession, gateway: Gateway, token: str | None = None) -> None:
        self._session = session
        self.url = gateway.url
        self.headers = {"Authorization": f"Bearer {gateway.token if token is None else token}"}

    async def rest(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        async with self._session.request(
            method, self.url + path, json=body, headers={**self.headers, **headers}
        ) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if text else None

    @asynccontextmanager
    async def sandbox(self, **config: Any) -> AsyncIterator[Socket]:
        """A sandbox that lives as long as the context, or as its config says."""
        async with self._opened("/api/v3/sandboxes/create", config_header(**config)) as made:
            yield made

    @asynccontextmanager
    async def connected(self, sandbox_id: str) -> AsyncIterator[Socket]:
        async with self._opened(f"/api/v3/sandbox/{sandbox_id}/connect", {}) as made:
            yield made

    @asynccontextmanager
    async def _opened(self, path: str, headers: dict[str, str]) -> AsyncIterator[Socket]:
        ws = await self._session.ws_connect(
            self.url + path, headers={**self.headers, **headers}, max_msg_size=0, autoclose=False
        )
        try:
            yield Socket(ws, ws._response.headers["x-deno-sandbox-id"])
        finally:
            with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
                await ws.close()


@asynccontextmanager
async def raw(gateway: Gateway, token: str | None = None) -> AsyncIterator[RawClient]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        yield RawClient(session, gateway, token)


async def all_messages(box: Socket) -> None:
    """Receives until the connection ends. :raises ConnectionError:"""
    while True:
        await box.receive()


async def listed(gateway: Gateway) -> list[str]:
    """Returns the sandboxes of the tests' organization, by the daemon's own word."""
    async with connected(gateway.daemon) as api:
        answer = await api.sandboxes.ListSandboxes(sandbox_pb2.ListSandboxesRequest(tenant=ORG))
        return [sandbox.id for sandbox in answer.sandboxes]
