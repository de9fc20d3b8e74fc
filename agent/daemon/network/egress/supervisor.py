"""Starting, adopting and ending the egress process, or connecting to one that a service manager runs."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agent.common.aio import run_to_completion
from agent.common.atomic_file import write_atomically
from agent.common.config.egress import EgressSettings
from agent.common.errors import HostError, VmmError
from agent.common.telemetry import EGRESS_STARTS, log
from agent.daemon.host import process as host_process
from agent.egress.control_protocol import ControlLink, LinkClosed
from agent.egress.launch import arguments_of, identity_of

_READY_TIMEOUT_S = 20.0


@dataclass(slots=True)
class EgressConnection:
    """Open link to an egress process. `sandboxes` are those that it serves: id to digest of the order."""

    link: ControlLink
    sandboxes: dict[str, str]
    identity: str


class EgressProcess(Protocol):
    """The one egress process of a node, as `EgressClient` needs it."""

    async def connect(self) -> EgressConnection:
        """Return a link to the running process; start one if that is the agent's task.

        :raises HostError: it cannot be started, or does not answer.
        """

    async def wait_ended(self) -> None:
        """Wait until the process has ended; for ever if only its link can tell."""

    async def terminate(self) -> None:
        """Kill the process after its link is lost, if the agent started it."""

    async def aclose(self, *, stop: bool) -> None:
        """With `stop`, kill a process that the agent started; else leave it to the next agent."""

    def last_output(self) -> str:
        """Return the end of the process's stderr, and where to find the rest."""


async def _hello(path: Path) -> EgressConnection | None:
    """Connect to a control socket and say hello; return None if no process answers as expected."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect(str(path))
        link = ControlLink(sock)
        async with asyncio.timeout(_READY_TIMEOUT_S):
            await link.send({"seq": 0, "op": "hello"})
            answer, _ = await link.receive()
        return EgressConnection(link, dict(answer["result"]["sandboxes"]), str(answer["result"]["settings"]))
    except (OSError, TimeoutError, LinkClosed, KeyError, TypeError, ValueError):
        sock.close()
        return None


class ExternalEgress:
    """Egress process that a service manager starts and restarts.

    :param path: its control socket.
    """

    def __init__(self, settings: EgressSettings, path: Path) -> None:
        self._identity = identity_of(settings)
        self._path = path

    async def connect(self) -> EgressConnection:
        """See `EgressProcess`."""
        connection = await _hello(self._path)
        if connection is None:
            raise HostError(
                f"no egress process answers at {self._path}: start sandboxd-egress.socket, or unset egress.control",
                reason="EGRESS_NOT_RUNNING",
            )
        if connection.identity != self._identity:
            log.warning("the egress process runs with different settings or code: restart sandboxd-egress.service")
        EGRESS_STARTS.labels("reached").inc()
        return connection

    async def wait_ended(self) -> None:
        """Wait for ever: the link closes when the process ends."""
        await asyncio.Event().wait()

    async def terminate(self) -> None:
        """Do nothing: the service manager ends it."""

    async def aclose(self, *, stop: bool) -> None:
        """Do nothing: without a link and sandboxes, the process exits by itself."""

    def last_output(self) -> str:
        """See `EgressProcess`."""
        return "see the journal of sandboxd-egress"


@dataclass(frozen=True, slots=True)
class EgressFiles:
    """Files by which a later agent finds the egress process of an earlier one."""

    directory: Path

    @property
    def socket(self) -> Path:
        """Control socket of the process."""
        return self.directory / "egress.sock"

    @property
    def facts(self) -> Path:
        """PID, start time and identity of the process that was started last, in JSON."""
        return self.directory / "egress.json"

    @property
    def log(self) -> Path:
        """The process's stderr."""
        return self.directory / "egress.log"


class ManagedEgress:
    """Egress process that the agent starts, or adopts from an earlier agent."""

    def __init__(self, settings: EgressSettings, files: EgressFiles) -> None:
        self._settings = settings
        self._files = files
        self._identity = {"settings": identity_of(settings)}
        self._process: host_process.HostProcess | None = None

    async def connect(self) -> EgressConnection:
        """See `EgressProcess`."""
        return await self._adopt() or await self._spawn()

    async def wait_ended(self) -> None:
        """See `EgressProcess`."""
        if self._process is not None:
            await self._process.wait()

    async def terminate(self) -> None:
        """See `EgressProcess`."""
        if self._process is not None:
            await self._process.kill()

    async def aclose(self, *, stop: bool) -> None:
        """See `EgressProcess`."""
        process, self._process = self._process, None
        if process is None:
            return
        if stop:
            await process.kill()
            for path in (self._files.socket, self._files.facts, self._files.log):
                path.unlink(missing_ok=True)
        else:
            process.forget()

    def last_output(self) -> str:
        """See `EgressProcess`."""
        tail = "" if self._process is None else self._process.stderr_tail()[-500:]
        return f"{tail or 'no output on stderr'}; see {self._files.log}"

    async def _adopt(self) -> EgressConnection | None:
        try:
            facts: dict[str, Any] = json.loads(self._files.facts.read_text())
            process = host_process.adopt(int(facts["pid"]), int(facts["started"]), self._files.log)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if process is None:
            return None
        connection = await _hello(self._files.socket) if facts.get("identity") == self._identity else None
        if connection is None:
            await process.kill()  # its settings or code differ, or it does not answer
            return None
        log.info("egress process adopted", pid=process.pid, sandboxes=len(connection.sandboxes))
        EGRESS_STARTS.labels("adopted").inc()
        self._process = process
        return connection

    async def _spawn(self) -> EgressConnection:
        self._files.socket.unlink(missing_ok=True)
        self._files.log.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
            try:
                listener.bind(str(self._files.socket))
                self._files.socket.chmod(0o600)
                listener.listen(4)
                process = self._process = await host_process.spawn(
                    [
                        sys.executable, "-m", "agent.egress", "--control", str(listener.fileno()),
                        "--identity", self._identity["settings"], *arguments_of(self._settings),
                    ],
                    netns=self._settings.uplink or None, stderr_path=self._files.log, pass_fds=[listener.fileno()],
                )  # fmt: skip
            except (OSError, VmmError) as error:
                raise HostError(f"cannot start the egress process: {error}", reason="EGRESS_NOT_STARTED") from error
        try:
            facts = {"pid": process.pid, "started": process.start_time, "identity": self._identity}
            write_atomically(self._files.facts, json.dumps(facts).encode(), mode=0o600, durable=False)
            EGRESS_STARTS.labels("started").inc()
            connection = await _hello(self._files.socket)
            if connection is None:
                raise HostError(f"the egress process does not answer: {self.last_output()}", reason="EGRESS_FAILED")
        except BaseException:  # a cancellation, too: without facts, no later agent finds the process
            await run_to_completion(process.kill())
            raise
        return connection
