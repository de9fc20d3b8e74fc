"""The agent's side of the egress process: starts it, finds it again, watches over it, and tells it what to do."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import proc
from agent.config import EgressSettings
from agent.egress.wire import Link, LinkClosed
from agent.errors import HostError, VmmError
from agent.telemetry import EGRESS_STARTS, log
from agent.waiting import to_the_end

_ANSWER_TIMEOUT_S = 15.0
_READY_TIMEOUT_S = 20.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 5.0
_HEALTHY_S = 10.0  # after so long, a death is not blamed on its start


@dataclass(frozen=True, slots=True)
class EgressFiles:
    """Where the agent keeps what it needs to find the process again."""

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


class EgressProcess:
    """One `sandboxd-egress`, kept alive.

    :param on_report: takes each report (`agent.egress.report`).
    :param on_empty: called when a process has no sandboxes yet, after every start of one: hands them over.
    """

    def __init__(
        self,
        settings: EgressSettings,
        files: EgressFiles,
        on_report: Callable[[dict[str, Any]], None],
        on_empty: Callable[[], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._files = files
        self._on_report = on_report
        self._on_empty = on_empty
        self._link: Link | None = None
        self._process: proc.HostProcess | None = None
        self._ready = asyncio.Event()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._seq = 0
        self._keeper: asyncio.Task[None] | None = None
        self._identity = {"settings": self._digest()}
        self.sandboxes: dict[str, str] = {}  # what the process had when it was found: id to digest

    def _digest(self) -> str:
        code = sorted((path.name, path.stat().st_mtime_ns) for path in Path(__file__).parent.glob("*.py"))
        text = repr((self._words(), self._settings.uplink, code))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _words(self) -> list[str]:
        words = ["--uid", str(self._settings.uid), "--gid", str(self._settings.gid)]
        for resolver in self._settings.resolvers:
            words += ["--resolver", resolver]
        if self._settings.upstream_ca_file:
            words += ["--ca-file", self._settings.upstream_ca_file]
        return words

    async def start(self) -> None:
        """Finds the process of an earlier agent, or starts one, and begins to watch over it. :raises HostError:"""
        process = await self._adopt()
        if process is None:
            process = await self._spawn()
        self._keeper = asyncio.create_task(self._keep(process), name="egress-keeper")

    async def aclose(self, *, stop: bool) -> None:
        """Ends the watch; with `stop`, the process as well."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._link is not None:
            self._link.close()
        process, self._process = self._process, None
        if process is None:
            return
        if stop:
            await process.kill()
            self._files.socket.unlink(missing_ok=True)
            self._files.facts.unlink(missing_ok=True)
            self._files.log.unlink(missing_ok=True)
        else:
            process.forget()

    # -- the process ---------------------------------------------------------------------------------------------------

    async def _adopt(self) -> proc.HostProcess | None:
        try:
            facts = json.loads(self._files.facts.read_text())
            process = proc.adopt(int(facts["pid"]), int(facts["started"]), self._files.log)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if process is None:
            return None
        if facts.get("identity") == self._identity and await self._connect():
            log.info("egress process found", pid=process.pid, sandboxes=len(self.sandboxes))
            EGRESS_STARTS.labels("adopted").inc()
            return process
        await process.kill()  # of other settings or other code, or it does not answer
        return None

    async def _spawn(self) -> proc.HostProcess:
        self._files.socket.unlink(missing_ok=True)
        self._files.log.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
            try:
                listener.bind(str(self._files.socket))
                self._files.socket.chmod(0o600)
                listener.listen(4)
                process = await proc.spawn(
                    [
                        sys.executable, "-m", "agent.egress", "--control", str(listener.fileno()),
                        "--identity", json.dumps(self._identity), *self._words(),
                    ],
                    netns=self._settings.uplink or None, stderr_path=self._files.log, pass_fds=[listener.fileno()],
                )  # fmt: skip
            except (OSError, VmmError) as error:
                raise HostError(f"cannot start the egress process: {error}", reason="EGRESS_NOT_STARTED") from error
        try:
            self.sandboxes = {}
            facts = {"pid": process.pid, "started": process.start_time, "identity": self._identity}
            self._files.facts.write_text(json.dumps(facts))
            EGRESS_STARTS.labels("started").inc()
            if not await self._connect():
                said = process.stderr_tail() or "it said nothing"
                raise HostError(f"the egress process does not answer: {said}", reason="EGRESS_FAILED")
        except BaseException:  # also a cancelled caller: nobody else knows of it
            await to_the_end(process.kill())
            raise
        return process

    async def _connect(self) -> bool:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(str(self._files.socket))
            link = Link(sock)
            async with asyncio.timeout(_READY_TIMEOUT_S):
                await link.send({"seq": 0, "op": "hello"})
                answer, _ = await link.receive()
            self.sandboxes = dict(answer["result"]["sandboxes"])
        except (OSError, TimeoutError, KeyError, TypeError, ValueError):
            sock.close()
            return False
        self._link = link
        return True

    async def _keep(self, process: proc.HostProcess) -> None:
        """Restarts the process whenever it ends; while it is away, nothing passes."""
        pause_s = _FIRST_PAUSE_S
        while True:
            self._process = process
            began = time.monotonic()
            await self._serve(process)
            if time.monotonic() - began > _HEALTHY_S:
                pause_s = _FIRST_PAUSE_S
            log.error("egress process ended; starting it again", said=process.stderr_tail()[-500:])
            while True:
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _LAST_PAUSE_S)
                try:
                    process = await self._spawn()
                    break
                except HostError as error:
                    log.error("egress process cannot be started", error=error.message)

    async def _serve(self, process: proc.HostProcess) -> None:
        """Returns when the process is gone, or its link: then it is ended."""
        assert self._link is not None
        receiving = asyncio.create_task(self._receive(self._link))
        ending = asyncio.create_task(process.wait())
        # Handing over needs the link to be read, and must not delay the notice that the process died.
        handing = asyncio.create_task(self._hand_over())
        try:
            await asyncio.wait({receiving, ending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ready.clear()
            for task in (receiving, ending, handing):
                task.cancel()
            await asyncio.gather(receiving, ending, handing, return_exceptions=True)
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(LinkClosed("the egress process ended"))
        self._link.close()
        await process.kill()

    async def _hand_over(self) -> None:
        try:
            await self._on_empty()
        except Exception:  # noqa: BLE001  what one sandbox lacks is its own affair: the others must work
            log.exception("handing sandboxes to the egress process failed")
        self._ready.set()

    async def _receive(self, link: Link) -> None:
        with contextlib.suppress(LinkClosed):
            while True:
                message, _ = await link.receive()
                if "event" in message:
                    self._on_report(message)
                elif (future := self._waiting.get(message["seq"])) is not None and not future.done():
                    future.set_result(message)

    # -- orders --------------------------------------------------------------------------------------------------------

    async def wait_ready(self) -> None:
        """Returns once the process runs and knows what it must. :raises HostError: not within 15 s."""
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                await self._ready.wait()
        except TimeoutError:
            raise HostError(
                f"the egress process does not run; see {self._files.log}", reason="EGRESS_NOT_RUNNING"
            ) from None

    async def call(self, op: str, fds: Sequence[int] = (), /, **fields: Any) -> dict[str, Any]:
        """Has the process do something and returns its result. :raises HostError: it failed, or is gone."""
        if self._link is None:
            raise HostError("the egress process does not run", reason="EGRESS_NOT_RUNNING")
        self._seq += 1
        seq = self._seq
        answer = self._waiting[seq] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                await self._link.send({"seq": seq, "op": op, **fields}, fds)
                message = await answer
        except (LinkClosed, TimeoutError) as error:
            raise HostError(f"the egress process did not answer: {error}", reason="EGRESS_NOT_RUNNING") from error
        finally:
            del self._waiting[seq]
        if "error" in message:
            raise HostError(f"the egress process refused: {message['error']}", reason="EGRESS_FAILED")
        result: dict[str, Any] = message["result"]
        return result


def identity_of(value: dict[str, Any]) -> str:
    """Returns a short digest of JSON values: the same for the same order to the process."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2s(text.encode(), key=os.fsencode("sandboxd"), digest_size=8).hexdigest()
