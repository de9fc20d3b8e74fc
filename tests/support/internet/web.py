"""The web servers of the test internet: HTTP/1.1, HTTP/2 and WebSocket by hypercorn, one application for all names."""

from __future__ import annotations

import asyncio
import hashlib
import json
import mimetypes
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs

import hypercorn.asyncio
import hypercorn.config

from tests.support.internet import zone
from tests.support.internet.log import Log

if TYPE_CHECKING:
    from hypercorn.typing import ASGIFramework

Scope = dict[str, Any]
_CHUNK = 64 << 10


class Web:
    """The application (ASGI). Every request is noted with the name that it was for."""

    def __init__(self, log: Log, files: Path) -> None:
        self._log = log
        self._files = files

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        host = next((value for name, value in headers if name == "host"), "")
        self._log.note(
            "http", host=host, path=scope["path"], query=scope["query_string"].decode("latin-1"), headers=headers,
            scheme=scope["scheme"], version=scope["http_version"],
        )  # fmt: skip
        if scope["type"] == "websocket":
            await self._websocket(receive, send)
        else:
            await self._http(scope, headers, receive, send)

    async def _websocket(self, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message.get("text"), "bytes": message.get("bytes")})

    async def _http(self, scope: Scope, headers: list[tuple[str, str]], receive: Any, send: Any) -> None:
        path = scope["path"]
        query = {key: values[0] for key, values in parse_qs(scope["query_string"].decode("latin-1")).items()}
        answer = getattr(self, f"_do_{path.strip('/').partition('/')[0].partition('.')[0]}", None)
        if answer is not None:
            await answer(scope, headers, query, receive, send)
        else:
            await _respond(send, 200, b"hello\n", "text/plain")

    async def _do_headers(self, scope: Scope, headers: Any, query: Any, receive: Any, send: Any) -> None:
        told = {
            "headers": headers, "path": scope["path"], "query": scope["query_string"].decode("latin-1"),
            "version": scope["http_version"], "method": scope["method"],
        }  # fmt: skip
        await _respond(send, 200, json.dumps(told).encode(), "application/json")

    async def _do_echo(self, scope: Scope, headers: Any, query: Any, receive: Any, send: Any) -> None:
        kind = next((value for name, value in headers if name == "content-type"), "application/octet-stream")
        await _start(send, 200, kind)
        async for piece in _body(receive):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})

    async def _do_count(self, scope: Scope, headers: Any, query: Any, receive: Any, send: Any) -> None:
        digest, size = hashlib.sha256(), 0
        async for piece in _body(receive):
            digest.update(piece)
            size += len(piece)
        await _respond(send, 200, json.dumps({"size": size, "sha256": digest.hexdigest()}).encode(), "application/json")

    async def _do_stream(self, scope: Scope, headers: Any, query: Any, receive: Any, send: Any) -> None:
        left = int(query.get("n", "1000"))
        await _start(send, 200, "application/octet-stream", length=left if "length" in query else None)
        piece = bytes(_CHUNK)
        while left > 0:
            await send({"type": "http.response.body", "body": piece[:left], "more_body": left > _CHUNK})
            left -= _CHUNK

    async def _do_sse(self, scope: Scope, headers: Any, query: Any, receive: Any, send: Any) -> None:
        await _start(send, 200, "text/event-stream")
        for number in range(int(query.get("n", "3"))):
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
            await asyncio.sleep(float(query.get("pause", "0.3")))
        await send({"type": "http.response.body"})

    async def _do_redirect(self, scope: Scope, headers: Any, query: Any, receive: Any, send: Any) -> None:
        await _start(send, 302, "text/plain", (b"location", query["to"].encode()))
        await send({"type": "http.response.body"})

    async def _do_digest(self, scope: Scope, headers: Any, query: Any, receive: Any, send: Any) -> None:
        """What arrived as x-key, in a form that nobody takes for the value on its way back."""
        key = next((value for name, value in headers if name == "x-key"), "")
        await _respond(send, 200, hashlib.sha256(key.encode()).hexdigest().encode(), "text/plain")

    async def _do_slow(self, scope: Scope, headers: Any, query: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(float(query.get("pause", "1")))
        await _respond(send, 200, b"late\n", "text/plain")

    async def _do_repo(self, scope: Scope, headers: Any, query: Any, receive: Any, send: Any) -> None:
        path = (self._files / scope["path"].lstrip("/")).resolve()
        if path.is_relative_to(self._files) and path.is_file():
            kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            await _respond(send, 200, path.read_bytes(), kind)
        else:
            await _respond(send, 404, b"no such file\n", "text/plain")


async def _body(receive: Any) -> Any:
    while (message := await receive())["type"] == "http.request":
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body"):
            return


async def _start(send: Any, status: int, kind: str, *extra: tuple[bytes, bytes], length: int | None = None) -> None:
    sized = [(b"content-length", b"%d" % length)] if length is not None else []
    headers = [(b"content-type", kind.encode()), *sized, *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _respond(send: Any, status: int, body: bytes, kind: str) -> None:
    await _start(send, status, kind, length=len(body))
    await send({"type": "http.response.body", "body": body})


async def serve(log: Log, directory: Path, stop: asyncio.Event) -> None:
    """Serves until `stop`. `directory` has certificates and files."""
    config = hypercorn.config.Config()
    config.bind = [f"[::]:{port}" for port in zone.HTTPS_PORTS]  # IPv4, too
    config.insecure_bind = [f"[::]:{port}" for port in zone.HTTP_PORTS]
    config.certfile, config.keyfile = str(directory / "server.pem"), str(directory / "server.key")
    config.errorlog = str(directory / "web.log")
    config.keep_alive_timeout = 600
    config.h2_max_inbound_frame_size = 1 << 20
    application = cast("ASGIFramework", Web(log, directory / "files"))
    await hypercorn.asyncio.serve(application, config, shutdown_trigger=stop.wait)
