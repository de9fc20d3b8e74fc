"""Who runs the egress process that the agent speaks to: the agent itself, or somebody else, such as systemd."""

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
from agent.egress.control_protocol import Link, LinkClosed
from agent.egress.launch import arguments_of, identity_of

_READY_TIMEOUT_S = 20.0


@dataclass(slots=True)
class Reached:
    """A link to a process, with the sandboxes that it has: id to digest."""

    link: Link
    sandboxes: dict[str, str]
    identity: str


class Peer(Protocol):
    """How the agent comes to an egress process."""

    async def reach(self) -> Reached:
        """Returns a link to a process that runs, and starts one if that is ours to do. :raises HostError:"""

    async def ended(self) -> None:
        """Returns once the process has ended, if that can be known."""

    async def give_up(self) -> None:
        """Ends a process whose link is lost, if it is ours."""

    async def aclose(self, *, stop: bool) -> None:
        """Ends a process that is ours, with `stop`; else leaves it to the next agent."""

    def said(self) -> str:
        """Returns the process's last words, and where to find more."""


async def _hello(path: Path) -> Reached | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect(str(path))
        link = Link(sock)
        async with asyncio.timeout(_READY_TIMEOUT_S):
            await link.send({"seq": 0, "op": "hello"})
            answer, _ = await link.receive()
        return Reached(link, dict(answer["result"]["sandboxes"]), str(answer["result"]["settings"]))
    except (OSError, TimeoutError, LinkClosed, KeyError, TypeError, ValueError):
        sock.close()
        return None


class KeptByOthers:
    """A process that somebody else starts, again when it ends. :param path: of its control socket."""

    def __init__(self, settings: EgressSettings, path: Path) -> None:
        self._identity = identity_of(settings)
        self._path = path

    async def reach(self) -> Reached:
        """See `Peer`."""
        reached = await _hello(self._path)
        if reached is None:
            raise HostError(
                f"no egress process answers at {self._path}: start sandboxd-egress.socket, or unset egress.control",
                reason="EGRESS_NOT_RUNNING",
            )
        if reached.identity != self._identity:
            log.warning("the egress process has other settings or other code: restart sandboxd-egress.service")
        EGRESS_STARTS.labels("reached").inc()
        return reached

    async def ended(self) -> None:
        """Never: the link says so."""
        await asyncio.Event().wait()

    async def give_up(self) -> None:
        """Nothing: whoever keeps it ends it."""

    async def aclose(self, *, stop: bool) -> None:
        """Nothing: without agent and sandboxes, it ends by itself."""

    def said(self) -> str:
        """See `Peer`."""
        return "see the journal of sandboxd-egress"


@dataclass(frozen=True, slots=True)
class EgressFiles:
    """Where the agent keeps what it needs to find a process of its own again."""

    directory: Path

    @property
    def socket(self) -> Path:
        """The control socket."""
        return self.directory / "egress.sock"

    @property
    def facts(self) -> Path:
        """PID, start time and identity of the process that was started last."""
        return self.directory / "egress.json"

    @property
    def log(self) -> Path:
        """What the process wrote to stderr."""
        return self.directory / "egress.log"


class Own:
    """A process that the agent starts; the next agent finds it."""

    def __init__(self, settings: EgressSettings, files: EgressFiles) -> None:
        self._settings = settings
        self._files = files
        self._identity = {"settings": identity_of(settings)}
        self._process: host_process.HostProcess | None = None

    async def reach(self) -> Reached:
        """See `Peer`."""
        return await self._adopt() or await self._spawn()

    async def ended(self) -> None:
        """See `Peer`."""
        if self._process is not None:
            await self._process.wait()

    async def give_up(self) -> None:
        """See `Peer`."""
        if self._process is not None:
            await self._process.kill()

    async def aclose(self, *, stop: bool) -> None:
        """See `Peer`."""
        process, self._process = self._process, None
        if process is None:
            return
        if stop:
            await process.kill()
            for path in (self._files.socket, self._files.facts, self._files.log):
                path.unlink(missing_ok=True)
        else:
            process.forget()

    def said(self) -> str:
        """See `Peer`."""
        tail = "" if self._process is None else self._process.stderr_tail()[-500:]
        return f"{tail or 'it said nothing'}; see {self._files.log}"

    async def _adopt(self) -> Reached | None:
        try:
            facts: dict[str, Any] = json.loads(self._files.facts.read_text())
            process = host_process.adopt(int(facts["pid"]), int(facts["started"]), self._files.log)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if process is None:
            return None
        reached = await _hello(self._files.socket) if facts.get("identity") == self._identity else None
        if reached is None:
            await process.kill()  # of other settings or other code, or it does not answer
            return None
        log.info("egress process found", pid=process.pid, sandboxes=len(reached.sandboxes))
        EGRESS_STARTS.labels("adopted").inc()
        self._process = process
        return reached

    async def _spawn(self) -> Reached:
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
            reached = await _hello(self._files.socket)
            if reached is None:
                raise HostError(f"the egress process does not answer: {self.said()}", reason="EGRESS_FAILED")
        except BaseException:  # also a cancelled caller: nobody else knows of it
            await run_to_completion(process.kill())
            raise
        return reached
