"""Control protocol between agent and egress process: JSON messages with file descriptors over a unix stream socket.

    agent -> egress   {"seq": 1, "op": "hello" | "assign" | "remove", ...}
    egress -> agent   {"seq": 1, "result": {...}} or {"seq": 1, "error": "..."}; {"event": "report", ...} at any time

A message is its length (4 bytes, big-endian) and that many bytes of JSON; descriptors come with its first byte
(unix(7), SCM_RIGHTS). Only the agent can connect to the socket, so both sides trust messages, but limit their size.
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
MAX_FDS = 16  # per message
_CHUNK_BYTES = 256 << 10
# Purposes of the listening sockets of a sandbox, in the order of their descriptors in "assign".
SOCKETS = ("dns-udp4", "dns-tcp4", "tcp4", "dns-udp6", "dns-tcp6", "tcp6")


class LinkClosed(ConnectionError):
    """The link is closed, or the other side sent something that is not a message."""


class ControlLink:
    """One end of the link. One task may receive; any number may send."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._waiting: dict[asyncio.Future[None], Callable[[int], object]] = {}  # and what unregisters each

    async def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send a message and copies of `fds`.

        :raises LinkClosed: the link broke, or was closed.
        """
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
        """Return the next message and its descriptors, which the caller must close.

        :raises LinkClosed: the link ended, or the message is malformed or over MAX_MESSAGE_BYTES.
        """
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
            # Never past this message: descriptors of the next one come with its first byte.
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
        """Shut the connection down, so that both sides fail to send and receive. `close` must follow. Idempotent."""
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
    """Close descriptors, ignoring those that are closed already."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
