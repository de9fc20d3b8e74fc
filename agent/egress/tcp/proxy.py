"""Transparent TCP proxy of a sandbox: accepts the guest's connections, up to the policy's limit.

The kernel redirects each connection to the proxy's socket (TPROXY). The destination that the guest connected to is the
local address of the accepted socket.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from ipaddress import ip_address

from agent.common.accepting import Acceptor
from agent.common.policy.addresses import Address
from agent.common.policy.reasons import Reason
from agent.egress.sandbox_state import SandboxState
from agent.egress.stderr_log import log_accept_failure
from agent.egress.tcp.connection import Dependencies, TcpConnection
from agent.egress.transport.sockets import no_delay, reset


class TcpProxy:
    """Proxy on the listening sockets of one sandbox."""

    def __init__(self, sandbox: SandboxState, dependencies: Dependencies) -> None:
        self._sandbox = sandbox
        self._dependencies = dependencies
        self._listeners: list[socket.socket] = []
        self._acceptors: list[Acceptor] = []
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, listeners: Sequence[socket.socket]) -> None:
        """Accept on these sockets, which the proxy owns and closes."""
        self._listeners = list(listeners)
        self._acceptors = [Acceptor(listener, self._accepted, log_accept_failure) for listener in self._listeners]

    async def aclose(self) -> None:
        """Close the sockets and reset all connections."""
        for acceptor in self._acceptors:
            acceptor.close()
        for listener in self._listeners:
            listener.close()
        self._sandbox.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accepted(self, client: socket.socket) -> None:
        try:
            host, port = client.getsockname()[:2]
            self._take(client, ip_address(host.partition("%")[0]), port)
        except (OSError, ValueError):
            reset(client)

    def _take(self, client: socket.socket, address: Address, port: int) -> None:
        limit = self._sandbox.policy.limits.connections
        if limit and len(self._sandbox.connections) >= limit:
            self._sandbox.deny(Reason.TOO_MANY_CONNECTIONS, str(address), port, "tcp")
            reset(client)
            return
        no_delay(client)
        connection = TcpConnection(self._sandbox, self._dependencies, client, address, port)
        self._sandbox.connections.add(connection)
        task = connection.start()
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(connection, done))

    def _ended(self, connection: TcpConnection, task: asyncio.Task[None]) -> None:
        self._sandbox.connections.discard(connection)
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler({"message": "a connection failed", "exception": error})
