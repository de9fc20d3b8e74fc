"""Serve the API's unix socket, and check the credentials of each client (SO_PEERCRED, unix(7)).

gRPC for Python can neither check nor report these credentials. So this module accepts connections on the public socket
and relays those of allowed users to gRPC's private socket, which lies in a directory that only the agent can enter. The
relay's end is bound to an abstract name with the client's UID and PID, which gRPC reports as the peer of each call.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import socket
import struct
from collections.abc import Set
from pathlib import Path

from agent.common.accepting import Acceptor
from agent.common.aio import TaskSet
from agent.common.telemetry import log

_BUFFER_BYTES = 256 << 10
_CREDENTIALS = struct.Struct("3i")
_SO_PEERGROUPS = 59  # asm-generic/socket.h; the socket module does not define it
_MAX_OPTION_BYTES = 1024  # the limit of Python's getsockopt: 256 groups


class PeerSocket:
    """Listener on the socket `public` that relays connections of allowed users to the socket `private`."""

    def __init__(self, public: Path, private: Path, allowed_uids: Set[int], allowed_gids: Set[int]) -> None:
        self._public = public
        self._private = private
        self._uids = allowed_uids
        self._gids = allowed_gids
        self._numbers = itertools.count()
        self._connections = TaskSet()
        self._listener: socket.socket | None = None
        self._acceptor: Acceptor | None = None
        self._owns_path = True

    async def start(self, listener: socket.socket | None = None) -> None:
        """Start to accept connections. The socket's mode lets all users connect: access is decided by credentials.

        :param listener: a socket that is bound and listens already (socket activation); its path is never removed.
        :raises OSError: the public socket cannot be bound.
        """
        self._owns_path = listener is None
        self._listener = listener or self._bind()
        self._acceptor = Acceptor(self._listener, self._accepted, _log_accept_failure)

    def _bind(self) -> socket.socket:
        self._public.parent.mkdir(parents=True, exist_ok=True)
        self._public.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        listener.bind(str(self._public))
        self._public.chmod(0o666)
        listener.listen(128)
        return listener

    def _accepted(self, peer: socket.socket) -> None:
        try:
            pid, uid, groups = credentials(peer)
        except OSError:  # the client has disconnected
            peer.close()
            return
        if uid in self._uids or not groups.isdisjoint(self._gids):
            self._connections.spawn(self._serve(peer, pid, uid))
        else:
            log.warning("refused connection to the API: user not allowed", uid=uid, pid=pid)
            peer.close()

    async def _serve(self, peer: socket.socket, pid: int, uid: int) -> None:
        with contextlib.ExitStack() as opened:
            opened.enter_context(peer)
            try:
                kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
                inner = opened.enter_context(socket.socket(socket.AF_UNIX, kind))
                inner.bind(f"\0sandboxd/{os.getpid()}/{next(self._numbers)}/uid={uid},pid={pid}")
                await asyncio.get_running_loop().sock_connect(inner, str(self._private))
            except OSError as error:
                log.error("cannot connect to the private API socket", error=str(error))
                return
            await asyncio.gather(_pump(peer, inner), _pump(inner, peer))

    async def aclose(self) -> None:
        """Stop listening and close all connections. Idempotent."""
        if self._acceptor is not None:
            self._acceptor.close()
        await self._connections.cancel()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            if self._owns_path:
                self._public.unlink(missing_ok=True)


def credentials(peer: socket.socket) -> tuple[int, int, set[int]]:
    """Return (PID, UID, GIDs) of the process that connected, as of the time of its connect(2).

    The GIDs are the effective one and the supplementary ones; the latter are left out if there are more than 256.

    :raises OSError: the peer has disconnected.
    """
    pid, uid, gid = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    try:
        packed = peer.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_OPTION_BYTES)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        packed = b""
    return pid, uid, {gid, *struct.unpack(f"{len(packed) // 4}I", packed)}


def _log_accept_failure(error: OSError) -> None:
    log.warning("cannot accept API connections", error=str(error))


async def _pump(source: socket.socket, target: socket.socket) -> None:
    """Copy bytes from `source` to `target` until EOF or an error, then shut down the target's writing side."""
    loop = asyncio.get_running_loop()
    buffer = bytearray(_BUFFER_BYTES)
    view = memoryview(buffer)
    with contextlib.suppress(OSError):
        while size := await loop.sock_recv_into(source, buffer):
            await loop.sock_sendall(target, view[:size])
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
