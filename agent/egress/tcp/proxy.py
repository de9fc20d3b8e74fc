"""The transparent TCP proxy of a sandbox: accepts its guest's connections, as many as it may have.

Whatever address a guest connects to, the kernel hands the connection here (TPROXY), with that address as the socket's
own.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence
from ipaddress import ip_address

from agent.common.policy.addresses import Address
from agent.common.policy.reasons import Reason
from agent.egress.sandbox_state import Sandbox
from agent.egress.tcp.connection import Means, TcpConnection
from agent.egress.tcp.sockets import no_delay, reset

_ACCEPT_AT_ONCE = 64
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_EXHAUSTED_PAUSE_S = 0.1


class TcpProxy:
    """Accepts for one sandbox."""

    def __init__(self, sandbox: Sandbox, means: Means) -> None:
        self._sandbox = sandbox
        self._means = means
        self._listeners: list[socket.socket] = []
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, listeners: Sequence[socket.socket]) -> None:
        """Begins to accept; takes the sockets over."""
        self._listeners = list(listeners)
        for listener in self._listeners:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    async def aclose(self) -> None:
        """Ends, with all connections."""
        for listener in self._listeners:
            self._loop.remove_reader(listener.fileno())
            listener.close()
        self._sandbox.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                client, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:  # it would be told again and again that somebody waits
                    self._loop.remove_reader(listener.fileno())
                    self._loop.call_later(_EXHAUSTED_PAUSE_S, self._resume, listener)
                return
            client.setblocking(False)
            try:
                host, port = client.getsockname()[:2]
                self._take(client, ip_address(host.partition("%")[0]), port)
            except (OSError, ValueError):
                reset(client)

    def _resume(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _take(self, client: socket.socket, address: Address, port: int) -> None:
        limit = self._sandbox.policy.limits.connections
        if limit and len(self._sandbox.connections) >= limit:
            self._sandbox.deny(Reason.TOO_MANY_CONNECTIONS, str(address), port, "tcp")
            reset(client)
            return
        no_delay(client)
        connection = TcpConnection(self._sandbox, self._means, client, address, port)
        self._sandbox.connections.add(connection)
        task = connection.task = asyncio.create_task(connection.run())
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(connection, done))

    def _ended(self, connection: TcpConnection, task: asyncio.Task[None]) -> None:
        self._sandbox.connections.discard(connection)
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler({"message": "a connection failed", "exception": error})
