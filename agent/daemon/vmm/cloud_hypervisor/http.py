"""HTTP/1.1 client for Cloud Hypervisor's API over a unix socket: one request per connection, read with h11.

The server (micro-http) has one thread, accepts bodies of at most 51,200 bytes in v53, and file descriptors that come
with the first bytes of a request (SCM_RIGHTS, unix(7)). It keeps the connection open after a response, and sends a
response without a body without Content-Length, too: such a response has no body here, where RFC 9112 says "until the
connection closes".
"""

from __future__ import annotations

import array
import asyncio
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h11

from agent.common.errors import GuestUnreachable, VmmError
from agent.daemon.vmm import sockets

MAX_BODY_BYTES = 51_200
_MAX_HEAD_BYTES = 16 << 10
_MAX_ANSWER_BYTES = 4 << 20
_MAX_TEXT = 1000
_READ_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class ApiResponse:
    """Status and body of one response."""

    status: int
    body: bytes


def refusal(name: str, answer: ApiResponse) -> VmmError:
    """Return the error for a response without success: its body is a JSON array of messages, the outermost first."""
    try:
        messages = json.loads(answer.body)
    except (ValueError, RecursionError):
        messages = None
    if isinstance(messages, list) and messages and all(isinstance(message, str) for message in messages):
        # The last messages may have a stack trace below their first line.
        text = ": ".join(message.partition("\n")[0] for message in messages)
    else:
        text = answer.body[:_MAX_TEXT].decode(errors="replace") or "it gave no reason"
    return VmmError(
        f"Cloud Hypervisor refused {name} (status {answer.status}): {text[:_MAX_TEXT]}",
        reason="VMM_API_REFUSED",
        status=str(answer.status),
    )


async def request(
    path: Path, method: str, name: str, body: bytes, fds: Sequence[int] = (), *, timeout_s: float
) -> ApiResponse:
    """Send one request to the server at `path` and return its response, whatever its status.

    :param name: of the API endpoint, such as "vm.boot".
    :param fds: descriptors to pass along.
    :raises VmmError: `body` is too large (VMM_API_TOO_LARGE), the response is late (VMM_API_TIMEOUT), malformed, or the
        VMM is gone (VMM_API_FAILED).
    """
    if len(body) > MAX_BODY_BYTES:
        raise VmmError(
            f"{name} needs {len(body)} bytes, and Cloud Hypervisor takes {MAX_BODY_BYTES}", reason="VMM_API_TOO_LARGE"
        )
    try:
        async with asyncio.timeout(timeout_s):
            sock = await sockets.connect(path)
            try:
                connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
                await _send(sock, _request(connection, method, name, body), fds)
                return await _receive(sock, connection)
            finally:
                sock.close()
    except TimeoutError as error:
        raise VmmError(
            f"Cloud Hypervisor did not answer {name} within {timeout_s:g} s", reason="VMM_API_TIMEOUT"
        ) from error
    except (OSError, GuestUnreachable) as error:
        raise VmmError(f"Cloud Hypervisor is gone: {error}", reason="VMM_API_FAILED") from error


def _request(connection: h11.Connection, method: str, name: str, body: bytes) -> bytes:
    headers = [("Host", "localhost"), ("Accept", "application/json")]
    if body:
        headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    data = connection.send(h11.Request(method=method, target=f"/api/v1/{name}", headers=headers)) or b""
    if body:
        data += connection.send(h11.Data(data=body)) or b""
    return data + (connection.send(h11.EndOfMessage()) or b"")


async def _send(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    sent = 0
    if fds:
        # The first message must carry the descriptors; nothing was sent before, so the socket has room for it.
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        sent = sock.sendmsg([data], [rights])
    await asyncio.get_running_loop().sock_sendall(sock, data[sent:])


async def _receive(sock: socket.socket, connection: h11.Connection) -> ApiResponse:
    try:
        response = await _next_event(sock, connection)
        while isinstance(response, h11.InformationalResponse):
            response = await _next_event(sock, connection)
        if not isinstance(response, h11.Response):
            raise _garbage(f"{type(response).__name__} for a response")
        headers = dict(response.headers)
        if b"content-length" not in headers and b"transfer-encoding" not in headers:
            return ApiResponse(response.status_code, b"")
        if int(headers.get(b"content-length", b"0")) > _MAX_ANSWER_BYTES:
            raise _garbage(f"a Content-Length of {headers[b'content-length'].decode()}")
        body = bytearray()
        while isinstance(event := await _next_event(sock, connection), h11.Data):
            body += event.data
            if len(body) > _MAX_ANSWER_BYTES:
                raise _garbage("an endless body")
    except h11.RemoteProtocolError as error:
        raise _garbage(str(error)) from error
    return ApiResponse(response.status_code, bytes(body))


async def _next_event(sock: socket.socket, connection: h11.Connection) -> object:
    while (event := connection.next_event()) is h11.NEED_DATA:
        data = await asyncio.get_running_loop().sock_recv(sock, _READ_BYTES)
        if not data:
            raise VmmError("Cloud Hypervisor closed its control socket", reason="VMM_API_FAILED")
        connection.receive_data(data)
    return event


def _garbage(what: str) -> VmmError:
    return VmmError(f"Cloud Hypervisor's control socket sent garbage: {what}", reason="VMM_API_FAILED")
