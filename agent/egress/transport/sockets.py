"""Small things that connected, non-blocking sockets are asked for."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

_LINGER_NONE = struct.pack("ii", 1, 0)


def reset(sock: socket.socket) -> None:
    """Closes a connection by a reset: what was not sent is dropped, and nobody takes it for an end."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
    sock.close()


def no_delay(sock: socket.socket) -> None:
    """Has small writes go out at once."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def wait_readable(*socks: socket.socket) -> None:
    """Returns when one of these can be read, or has ended."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    try:
        for sock in socks:
            loop.add_reader(sock.fileno(), _wake, ready)
        await ready
    finally:
        for sock in socks:
            if sock.fileno() >= 0:
                loop.remove_reader(sock.fileno())


async def wait_writable(sock: socket.socket) -> None:
    """Returns when this can be written to, or has ended."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(sock.fileno(), _wake, ready)
    try:
        await ready
    finally:
        if sock.fileno() >= 0:
            loop.remove_writer(sock.fileno())


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
