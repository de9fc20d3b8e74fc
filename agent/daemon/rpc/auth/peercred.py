"""The unix socket of the API, with the credentials of whoever connects (SO_PEERCRED of unix(7)).

gRPC for Python can neither show nor check them. So the public socket is ours: a connection from an allowed user is
relayed to gRPC's own socket, in a directory that only the agent can enter, and our end is bound to an abstract name
with the user and PID in it, which gRPC reports as the peer of each call.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import socket
import struct
from collections.abc import Coroutine, Set
from pathlib import Path

from agent.common.accepting import Acceptor
from agent.common.telemetry import log

_BUFFER_BYTES = 256 << 10
_CREDENTIALS = struct.Struct("3i")
_SO_PEERGROUPS = 59  # asm-generic/socket.h; Python has no name for it
_MAX_OPTION_BYTES = 1024  # of Python's getsockopt: 256 groups


class PeerSocket:
    """Listens on `public`, relays allowed peers to `private`."""

    def __init__(self, public: Path, private: Path, allowed_uids: Set[int], allowed_gids: Set[int]) -> None:
        self._public = public
        self._private = private
        self._uids = allowed_uids
        self._gids = allowed_gids
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._acceptor: Acceptor | None = None
        self._is_ours = True

    async def start(self, listener: socket.socket | None = None) -> None:
        """Binds the public socket, for everybody: who may speak is decided by credentials. :raises OSError:

        :param listener: one that is bound already, by somebody whose it stays.
        """
        self._is_ours = listener is None
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

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _accepted(self, peer: socket.socket) -> None:
        try:
            pid, uid, groups = credentials(peer)
        except OSError:  # it is gone already
            peer.close()
            return
        if uid in self._uids or not groups.isdisjoint(self._gids):
            self._spawn(self._serve(peer, pid, uid))
        else:
            log.warning("refused a peer", uid=uid, pid=pid)
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
                log.error("cannot reach our own socket", error=str(error))
                return
            await asyncio.gather(_pump(peer, inner), _pump(inner, peer))

    async def aclose(self) -> None:
        """Stops listening and ends every connection. Idempotent."""
        if self._acceptor is not None:
            self._acceptor.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            if self._is_ours:
                self._public.unlink(missing_ok=True)


def credentials(peer: socket.socket) -> tuple[int, int, set[int]]:
    """Returns (pid, uid, groups) of the process that connected, as they were then.

    The groups are the effective one and, unless there are more than 256, the supplementary ones.

    :raises OSError: the peer is gone.
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
    log.warning("cannot accept connections of the API", error=str(error))


async def _pump(source: socket.socket, target: socket.socket) -> None:
    """Moves bytes until the source ends, then ends the target's input."""
    loop = asyncio.get_running_loop()
    buffer = bytearray(_BUFFER_BYTES)
    view = memoryview(buffer)
    with contextlib.suppress(OSError):
        while size := await loop.sock_recv_into(source, buffer):
            await loop.sock_sendall(target, view[:size])
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
