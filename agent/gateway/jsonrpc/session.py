"""What the connections to one sandbox share: where it is, its processes by PID, the mask of new files' modes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from agent.common.api_client import Api
from agent.common.model import DEFAULT_USER
from agent.gateway.errors import process_gone
from agent.gateway.nodes.nodes import NodeLink
from sandboxd.v1 import process_pb2

if TYPE_CHECKING:
    from agent.gateway.ingress.exposures import Exposures
    from agent.gateway.jsonrpc.connection import Connection
    from agent.gateway.methods.repl import Repl

_MAX_PIDS = 4096
DEFAULT_UMASK = 0o022

USER = DEFAULT_USER  # whose rights files and processes of the SDKs have


class Attachment:
    """One sandbox as the gateway knows it while a client is connected.

    :param id: as the API has it. :param sdk_id: as the SDKs have it.
    """

    def __init__(self, link: NodeLink, sandbox_id: str, sdk_id: str, org: str, exposures: Exposures) -> None:
        self.link = link
        self.id = sandbox_id
        self.sdk_id = sdk_id
        self.org = org
        self.exposures = exposures
        self.umask = DEFAULT_UMASK
        self.ending = False  # its calls fail by themselves: the closed connection says why
        self.users = 0  # who have not released it yet
        self.connections: set[Connection] = set()
        self.repls: dict[int, Repl] = {}  # by PID
        self._processes: dict[int, int] = {}  # PID -> process_id, in order of start

    @property
    def api(self) -> Api:
        """The API of the sandbox's node."""
        return self.link.api

    def note_process(self, pid: int, process_id: int) -> None:
        """Remembers a process that was started here."""
        self._processes[pid] = process_id
        while len(self._processes) > _MAX_PIDS:
            del self._processes[next(iter(self._processes))]

    async def process_id(self, pid: int) -> int:
        """Returns the API's identity of a process. :raises Failure: there is none, or it was forgotten."""
        found = self._processes.get(pid)
        if found is None:
            request = process_pb2.ListProcessesRequest(sandbox_id=self.id)
            for process in (await self.api.processes.ListProcesses(request)).processes:
                self.note_process(process.pid, process.process_id)  # the last with a PID is the newest
            found = self._processes.get(pid)
        if found is None:
            raise process_gone(pid)
        return found

    async def close(self, reason: str) -> None:
        """Closes every connection."""
        self.ending = True
        await asyncio.gather(*(connection.close(reason) for connection in list(self.connections)))
