"""The link between the agent and the egress process: JSON messages, with file descriptors, over a unix stream socket.

    agent -> egress   {"seq": 1, "op": "hello" | "assign" | "remove" | "list", ...}
    egress -> agent   {"seq": 1, "result": {...}} or {"seq": 1, "error": "..."}; {"event": "report", ...} at any time

Each message is its length (4 bytes, big-endian) and that many bytes of JSON; descriptors come with its first byte
(unix(7), SCM_RIGHTS). Only the agent can reach the socket: both sides trust what they read, but not its size.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

_LENGTH_BYTES = 4
MAX_MESSAGE_BYTES = 16 << 20
MAX_FDS = 16  # of one message
_CHUNK_BYTES = 256 << 10
# What the listening sockets of a sandbox are for, in the order in which "assign" brings them.
SOCKETS = ("dns-udp4", "dns-tcp4", "tcp4", "dns-udp6", "dns-tcp6", "tcp6")


class LinkClosed(ConnectionError):
    """The other side is gone, or spoke nonsense."""


class ControlLink:
    """One end. One task may receive and any number send."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._waiting: dict[asyncio.Future[None], Callable[[int], object]] = {}  # with what removes its registration

    async def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Sends a message and copies of `fds`. :raises LinkClosed:"""
        body = json.dumps(message, separators=(",", ":")).encode()
        data = memoryview(len(body).to_bytes(_LENGTH_BYTES, "big") + body)
        async with self._sending:
            try:
                while data:
                    try:
                        sent = socket.send_fds(self._sock, [data[:_CHUNK_BYTES]], fds) if fds else self._sock.send(data)
                    except BlockingIOError:
                        await self._ready(self._loop.add_writer, self._loop.remove_writer)
                        continue
                    data, fds = data[sent:], ()
            except OSError as error:
                raise LinkClosed(f"the link is gone: {error}") from error

    async def receive(self) -> tuple[dict[str, Any], list[int]]:
        """Returns the next message and its descriptors, which the caller must close. :raises LinkClosed:"""
        await self._fill(_LENGTH_BYTES)
        fds, self._fds = self._fds, []
        try:
            size = int.from_bytes(self._buffer[:_LENGTH_BYTES], "big")
            if size > MAX_MESSAGE_BYTES:
                raise LinkClosed(f"a message of {size} bytes is over the limit")
            await self._fill(_LENGTH_BYTES + size)
            message = json.loads(self._buffer[_LENGTH_BYTES : _LENGTH_BYTES + size])
            if not isinstance(message, dict):
                raise LinkClosed("a message must be an object")
        except (LinkClosed, ValueError, asyncio.CancelledError) as error:
            close_all(fds)
            raise (LinkClosed(f"a message is not JSON: {error}") if isinstance(error, ValueError) else error) from None
        del self._buffer[: _LENGTH_BYTES + size]
        return message, fds

    async def _fill(self, size: int) -> None:
        while len(self._buffer) < size:
            # Never past the message: the next one's descriptors come with its first byte.
            wanted = min(size - len(self._buffer), _CHUNK_BYTES)
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, wanted, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader)
                continue
            except OSError as error:
                raise LinkClosed(f"the link is gone: {error}") from error
            self._fds += fds
            if not data:
                raise LinkClosed("the other side closed the link")
            self._buffer += data

    async def _ready(self, add: Any, remove: Any) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        number = self._sock.fileno()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        add(number, wake)
        self._waiting[ready] = remove
        try:
            await ready
        finally:
            if self._waiting.pop(ready, None) is not None:
                remove(number)

    def hang_up(self) -> None:
        """Ends the link for whoever sends or receives here, too. Idempotent."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the link: the other side, and tasks that send or receive here, see LinkClosed. Idempotent."""
        # The number may be another socket's as soon as this one is closed.
        while self._waiting:
            ready, remove = self._waiting.popitem()
            remove(self._sock.fileno())
            if not ready.done():
                ready.set_exception(LinkClosed("this end closed the link"))
        close_all(self._fds)
        self._fds = []
        self._sock.close()


def close_all(fds: Sequence[int]) -> None:
    """Closes descriptors; those that are closed already are left."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
