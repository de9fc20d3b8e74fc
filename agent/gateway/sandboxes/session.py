"""State that all connections to one sandbox share: its node, its processes by PID, the umask."""

from __future__ import annotations

import asyncio
from typing import Protocol

from agent.common.api_client import Api
from agent.gateway.errors import process_gone
from agent.gateway.nodes.guest_repl import GuestRepl
from agent.gateway.nodes.nodes import Node
from agent.gateway.sandboxes.exposures import Exposures
from sandboxd.v1 import process_pb2

_MAX_PIDS = 4096
_DEFAULT_UMASK = 0o022


class ClientConnection(Protocol):
    """A client's socket to the sandbox."""

    async def close(self, reason: str) -> None:
        """Close the socket and tell the client the reason."""


class Session:
    """One sandbox while at least one client is connected to it.

    :param sandbox_id: id in the API.
    :param sdk_id: id in the SDKs' form.
    """

    def __init__(self, node: Node, sandbox_id: str, sdk_id: str, org: str, exposures: Exposures) -> None:
        self.node = node
        self.sandbox_id = sandbox_id
        self.sdk_id = sdk_id
        self.org = org
        self.exposures = exposures
        self.umask = _DEFAULT_UMASK
        # The sandbox is being deleted: pending calls fail, and their errors are not sent, since the SDKs report the
        # reason with which the connection closes.
        self.ending = False
        self.users = 0  # holders that have not released the session yet
        self.connections: set[ClientConnection] = set()
        self.repls: dict[int, GuestRepl] = {}  # by PID
        self._process_ids: dict[int, int] = {}  # PID -> process_id of the API, in order of start

    @property
    def api(self) -> Api:
        """API of the sandbox's node."""
        return self.node.api

    def remember_process(self, pid: int, process_id: int) -> None:
        """Store the API's id of a process; the oldest is dropped beyond a limit."""
        self._process_ids[pid] = process_id
        while len(self._process_ids) > _MAX_PIDS:
            del self._process_ids[next(iter(self._process_ids))]

    async def process_id(self, pid: int) -> int:
        """Return the API's id of a process.

        :raises CallError: no process has this PID, and none had it recently.
        """
        found = self._process_ids.get(pid)
        if found is None:
            request = process_pb2.ListProcessesRequest(sandbox_id=self.sandbox_id)
            for process in (await self.api.processes.ListProcesses(request)).processes:
                self.remember_process(process.pid, process.process_id)  # the last one with a PID is the newest
            found = self._process_ids.get(pid)
        if found is None:
            raise process_gone(pid)
        return found

    async def close(self, reason: str) -> None:
        """Close all connections."""
        self.ending = True
        await asyncio.gather(*(connection.close(reason) for connection in list(self.connections)))
