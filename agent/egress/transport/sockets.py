"""Helpers for connected, non-blocking sockets: reset, TCP_NODELAY, waiting."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

_LINGER_NONE = struct.pack("ii", 1, 0)


def reset(sock: socket.socket) -> None:
    """Close a connection by a reset: unsent data is dropped, and the peer does not mistake it for an orderly end."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
    sock.close()


def no_delay(sock: socket.socket) -> None:
    """Send small writes at once (TCP_NODELAY)."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def wait_readable(*socks: socket.socket) -> None:
    """Wait until one of the sockets is readable or closed by its peer. They must stay open meanwhile."""
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
    """Wait until the socket is writable or closed by its peer. It must stay open meanwhile."""
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
