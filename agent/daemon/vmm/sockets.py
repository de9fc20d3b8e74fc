"""Unix sockets that the agent binds and hands to a VMM: clients can connect before the VMM is up, without polling."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

from agent.common.errors import GuestUnreachable, VmmError

_MAX_PATH_BYTES = 107  # sun_path of unix(7), less its NUL
_MAX_REPLY_BYTES = 64


def listen(path: Path) -> socket.socket:
    """Return a listening socket bound to `path`, which is replaced if it exists.

    :raises VmmError: the path is too long for a unix socket.
    """
    if len(str(path).encode()) > _MAX_PATH_BYTES:
        raise VmmError(f"socket path {path} is over {_MAX_PATH_BYTES} bytes; choose a shorter paths.run_dir")
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.bind(str(path))
        sock.listen(16)
    except BaseException:
        sock.close()
        raise
    return sock


async def connect(path: Path) -> socket.socket:
    """Return a non-blocking connection to `path`.

    :raises GuestUnreachable: no process listens there, or its queue is full.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        await asyncio.get_running_loop().sock_connect(sock, str(path))
        sock.getpeername()  # asyncio takes EAGAIN, which is a full queue here (connect(2)), for a connection
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            raise GuestUnreachable(f"the virtual machine's socket {path.name} does not answer: {error}") from error
        raise
    return sock


async def connect_vsock(path: Path, port: int, timeout_s: float = 5.0) -> socket.socket:
    """Return a connection to the guest's AF_VSOCK `port` through a VMM's unix socket: `CONNECT <port>` -> `OK <n>`.

    This is the handshake of Firecracker, Cloud Hypervisor and vhost-device-vsock.

    :raises GuestUnreachable: no process in the guest listens on that port, or the answer is malformed or late.
    """
    sock = await connect(path)
    loop = asyncio.get_running_loop()
    reply = b""
    try:
        async with asyncio.timeout(timeout_s):
            await loop.sock_sendall(sock, f"CONNECT {port}\n".encode())
            while not reply.endswith(b"\n"):
                # One byte at a time: the bytes after the line belong to the link.
                byte = await loop.sock_recv(sock, 1)
                reply += byte
                if not byte or len(reply) > _MAX_REPLY_BYTES:
                    raise GuestUnreachable(f"the guest refused vsock port {port}: {reply[:_MAX_REPLY_BYTES]!r}")
        if not reply.startswith(b"OK "):
            raise GuestUnreachable(f"the vsock handshake failed: {reply!r}")
    except BaseException as error:
        with contextlib.suppress(OSError):
            sock.close()
        if isinstance(error, TimeoutError | OSError):
            raise GuestUnreachable(f"the vsock handshake failed: {error!r}") from error
        raise
    return sock
