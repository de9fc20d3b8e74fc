"""HTTP/1.1 over a unix socket, as much as Cloud Hypervisor's server speaks: one request a connection.

Its server (micro-http) has one thread, accepts bodies of at most 51,200 bytes in v53, and takes file descriptors that
come with the first bytes of a request (SCM_RIGHTS, unix(7)). Of an answer only status, Content-Length and body matter.
"""

from __future__ import annotations

import array
import asyncio
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.common.errors import GuestUnreachable, VmmError
from agent.daemon.vmm import sockets

MAX_BODY_BYTES = 51_200
_MAX_HEAD_BYTES = 16 << 10
_MAX_ANSWER_BYTES = 4 << 20
_MAX_TEXT = 1000
_READ_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Answer:
    """Status and body of one answer."""

    status: int
    body: bytes


def refusal(name: str, answer: Answer) -> VmmError:
    """Returns the error for an answer that is none of success: a JSON array of messages, the outermost first."""
    try:
        messages = json.loads(answer.body)
    except (ValueError, RecursionError):
        messages = None
    if isinstance(messages, list) and messages and all(isinstance(message, str) for message in messages):
        # The last ones may carry a stack trace below their first line.
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
) -> Answer:
    """Sends one request to the server at `path` and returns its answer, whatever its status.

    :raises VmmError: nobody answers, not in time, or not in HTTP.
    """
    if len(body) > MAX_BODY_BYTES:
        raise VmmError(
            f"{name} needs {len(body)} bytes, and Cloud Hypervisor takes {MAX_BODY_BYTES}", reason="VMM_API_TOO_LARGE"
        )
    try:
        async with asyncio.timeout(timeout_s):
            sock = await sockets.connect(path)
            try:
                await _send(sock, _head(method, name, body) + body, fds)
                return await _receive(sock)
            finally:
                sock.close()
    except TimeoutError as error:
        raise VmmError(
            f"Cloud Hypervisor did not answer {name} within {timeout_s:g} s", reason="VMM_API_TIMEOUT"
        ) from error
    except (OSError, GuestUnreachable) as error:
        raise VmmError(f"Cloud Hypervisor is gone: {error}", reason="VMM_API_FAILED") from error


def _head(method: str, name: str, body: bytes) -> bytes:
    lines = [f"{method} /api/v1/{name} HTTP/1.1", "Host: localhost", "Accept: application/json"]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode()


async def _send(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    sent = 0
    if fds:
        # Nothing was sent before: there is room, and the first message must carry them.
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        sent = sock.sendmsg([data], [rights])
    await asyncio.get_running_loop().sock_sendall(sock, data[sent:])


async def _receive(sock: socket.socket) -> Answer:
    loop = asyncio.get_running_loop()
    data = bytearray()
    while (end := data.find(b"\r\n\r\n")) < 0:
        if len(data) > _MAX_HEAD_BYTES:
            raise _garbage("an endless head")
        data += await _some(loop, sock)
    status, length = _parse_head(bytes(data[:end]))
    del data[: end + 4]
    while len(data) < length:
        data += await _some(loop, sock)
    return Answer(status, bytes(data[:length]))


async def _some(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> bytes:
    data = await loop.sock_recv(sock, _READ_BYTES)
    if not data:
        raise VmmError("Cloud Hypervisor closed its control socket", reason="VMM_API_FAILED")
    return data


def _parse_head(head: bytes) -> tuple[int, int]:
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split()
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not (words[1].isdecimal() and len(words[1]) == 3):
        raise _garbage(repr(first[:80]))
    length = 0
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-length":
            text = value.strip()
            if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) > _MAX_ANSWER_BYTES:
                raise _garbage(f"a Content-Length of {text[:20]!r}")
            length = int(text)
    return int(words[1]), length


def _garbage(what: str) -> VmmError:
    return VmmError(f"Cloud Hypervisor's control socket sent garbage: {what}", reason="VMM_API_FAILED")
