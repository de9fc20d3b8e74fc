"""Random operations on 20 sandboxes at a time, with an agent that is killed or restarted now and then:
`just churn --minutes 30`.

After each restart every sandbox that was acknowledged must be there, in the state that was acknowledged, and none that
was deleted; what was under way may be done or not. Each sandbox holds a word of its own, which no other may have.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil

from agent.common.api_client import is_cut_off
from sandboxd.v1 import sandbox_pb2 as pb
from tests.support import leaks
from tests.support.client import MIB, Client, reason
from tests.support.daemon import Daemon, start_daemon

SANDBOXES = 20
WORKERS = 4
RESTART_EVERY_S = 45.0
SETTLE_S = 60.0  # after which memory and descriptors must be flat
SETTINGS = {
    "sandbox__on_stop": "keep", "log__level": "warning", "node__memory_overcommit": "4", "node__cpu_overcommit": "64",
}  # fmt: skip
RUNNING, PAUSED, SUSPENDED = pb.Sandbox.STATE_RUNNING, pb.Sandbox.STATE_PAUSED, pb.Sandbox.STATE_SUSPENDED
# Or it would wait, with all channels to the address, until a failed attempt is forgotten.
_OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
# What an operation may meet because another one, or a restart, came first.
EXPECTED = frozenset(
    {
        "UNAVAILABLE", "CANCELLED", "GUEST_UNREACHABLE", "SANDBOX_NOT_RUNNING", "SANDBOX_NOT_FOUND",
        "SANDBOX_DELETING", "SANDBOX_DELETED",
    }
)  # fmt: skip


@dataclass
class Known:
    """A sandbox as it was acknowledged last; `state` None while an operation on it has no answer yet."""

    word: str
    state: int | None = RUNNING


@dataclass
class Churn:
    """The world as the client knows it."""

    directory: Path
    rng: random.Random
    daemon: Daemon | None = None
    channel: grpc.aio.Channel | None = None
    known: dict[str, Known] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    up: asyncio.Event = field(default_factory=asyncio.Event)
    making: int = 0

    # -- operations ----------------------------------------------------------------------------------------------------

    def api(self) -> Client:
        assert self.channel is not None
        return Client(self.channel)

    async def connect(self) -> None:
        """Connects anew: an old channel would wait ever longer before it tries again."""
        if self.channel is not None:
            await self.channel.close(None)
        self.channel = grpc.aio.insecure_channel(self.daemon_now().address, _OWN_CONNECTION)

    def pick(self, *states: int) -> str | None:
        found = [name for name, known in self.known.items() if known.state in states]
        return self.rng.choice(found) if found else None

    async def create(self) -> bool:
        if len(self.known) + self.making >= SANDBOXES:
            return False
        self.making += 1
        try:
            request = pb.CreateSandboxRequest(memory_bytes=128 * MIB, disk_bytes=32 * MIB)
            made = await self.api().sandboxes.CreateSandbox(request)
        finally:
            self.making -= 1
        self.known[made.id] = Known(made.id)
        await self.write(made.id)
        return True

    async def write(self, sandbox_id: str) -> None:
        self.known[sandbox_id].word = ""  # unknown, should the answer be lost
        await self.api().run(sandbox_id, "sh", "-c", f"echo {sandbox_id} > /home/sandbox/word")
        self.known[sandbox_id].word = sandbox_id

    async def execute(self) -> bool:
        name = self.pick(RUNNING)
        if name is None:
            return False
        word = self.known[name].word
        result = await self.api().run(name, "cat", "/home/sandbox/word")
        if word and result.stdout.decode().strip() != word:
            self.wrong.append(f"{name} holds {result.stdout!r}, not {word}")
        return True

    async def move(self, name: str | None, wanted: int, work: Callable[[str], Awaitable[object]]) -> bool:
        if name is None:
            return False
        known = self.known[name]
        known.state = None
        await work(name)
        known.state = wanted
        return True

    async def pause(self) -> bool:
        async def work(name: str) -> object:
            return await self.api().sandboxes.PauseSandbox(pb.PauseSandboxRequest(id=name))

        return await self.move(self.pick(RUNNING), PAUSED, work)

    async def suspend(self) -> bool:
        async def work(name: str) -> object:
            return await self.api().sandboxes.PauseSandbox(pb.PauseSandboxRequest(id=name, to_disk=True))

        return await self.move(self.pick(RUNNING, PAUSED), SUSPENDED, work)

    async def resume(self) -> bool:
        async def work(name: str) -> object:
            return await self.api().sandboxes.ResumeSandbox(pb.ResumeSandboxRequest(id=name))

        return await self.move(self.pick(PAUSED, SUSPENDED), RUNNING, work)

    async def fork(self) -> bool:
        name = self.pick(RUNNING)
        if name is None or len(self.known) + self.making >= SANDBOXES:
            return False
        known, self.making = self.known[name], self.making + 1
        known.state = None
        try:
            made = await self.api().sandboxes.ForkSandbox(pb.ForkSandboxRequest(id=name))
        finally:
            self.making -= 1
        known.state = RUNNING
        for copy in made.sandboxes:
            self.known[copy.id] = Known(known.word)
            await self.write(copy.id)
        return True

    async def delete(self) -> bool:
        name = self.pick(RUNNING, PAUSED, SUSPENDED)
        if name is None:
            return False
        self.known[name].state = None
        await self.api().sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=name))
        del self.known[name]
        self.deleted.add(name)
        return True

    async def work(self, until: float) -> None:
        """Does one random operation after another."""
        weights = {
            self.create: 6, self.execute: 20, self.pause: 2, self.suspend: 2, self.resume: 5, self.fork: 1,
            self.delete: 3,
        }  # fmt: skip
        while time.monotonic() < until:
            await self.up.wait()
            operation = self.rng.choices(list(weights), list(weights.values()))[0]
            try:
                if await operation():
                    self.done[operation.__name__] += 1
                else:
                    await asyncio.sleep(0.01)
            except grpc.aio.AioRpcError as error:
                why = self.why(error)
                self.failed[f"{operation.__name__}: {why}"] += 1
                if why not in EXPECTED:
                    self.wrong.append(f"{operation.__name__}: {why}: {error.details()}")
                await asyncio.sleep(0.1)

    @staticmethod
    def why(error: grpc.aio.AioRpcError) -> str:
        if is_cut_off(error):
            return "UNAVAILABLE"  # grpc lost the status, since the agent was ended meanwhile
        try:
            return reason(error)
        except AssertionError:
            return str(error.code().name)

    # -- the agent -----------------------------------------------------------------------------------------------------

    async def restart_now_and_then(self, until: float) -> None:
        """Ends the agent, in order or not, has the next one take over, and looks at what it found."""
        while (left := until - time.monotonic()) > RESTART_EVERY_S:
            await asyncio.sleep(min(left, RESTART_EVERY_S * self.rng.uniform(0.5, 1.5)))
            assert self.daemon is not None
            self.up.clear()
            if self.rng.random() < 0.5:
                self.daemon.kill()
                self.done["agent killed"] += 1
            else:
                code = await asyncio.to_thread(self.daemon.stop)
                self.done["agent restarted"] += 1
                if code != 0:
                    self.wrong.append(f"the agent ended with {code}")
            await asyncio.sleep(1)  # calls of the old one have ended
            self.daemon = await asyncio.to_thread(lambda: start_daemon(self.directory, **SETTINGS))
            await self.connect()
            await self.compare()
            self.up.set()

    async def compare(self) -> None:
        """Compares what there is with what was acknowledged, and takes it for known from now on."""
        answer = await self.api().sandboxes.ListSandboxes(pb.ListSandboxesRequest(page_size=1000))
        present = {sandbox.id: sandbox for sandbox in answer.sandboxes}
        for name, known in list(self.known.items()):
            found = present.get(name)
            if known.state is not None and (found is None or found.state != known.state):
                self.wrong.append(f"{name} was {known.state} and is {found.state if found else 'lost'}")
            if found is None:
                del self.known[name]
        for name, found in present.items():
            if name in self.deleted:
                self.wrong.append(f"{name} was deleted and is there")
            if found.state not in (RUNNING, PAUSED, SUSPENDED):
                self.wrong.append(f"{name} is {pb.Sandbox.State.Name(found.state)}: {found.error[:300]}")
                await self.forget(name)
                continue
            self.known.setdefault(name, Known("")).state = found.state

    async def forget(self, name: str) -> None:
        await self.api().sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=name))
        self.known.pop(name, None)

    def daemon_now(self) -> Daemon:
        assert self.daemon is not None
        return self.daemon

    def size(self) -> tuple[int, int]:
        """Returns memory (RSS, bytes) and descriptors of the agent."""
        process = psutil.Process(self.daemon_now().process.pid)
        return process.memory_info().rss, len(os.listdir(f"/proc/{process.pid}/fd"))


def end(churn: Churn) -> list[str]:
    """Ends the agent, and whatever a run that was broken off has left; returns what is there even then."""
    if churn.daemon_now().process.poll() is None:
        churn.daemon_now().stop()
    left = churn.daemon_now().left()
    churn.daemon = start_daemon(churn.directory, **(SETTINGS | {"sandbox__on_stop": "delete"}))
    churn.daemon.stop()
    return left


async def run(minutes: float, seed: int) -> dict[str, object]:
    """Returns the figures of a run."""
    before = leaks.snapshot()
    churn = Churn(leaks.make_directory(), random.Random(seed))
    churn.daemon = start_daemon(churn.directory, **SETTINGS)
    until = time.monotonic() + minutes * 60
    sizes: list[tuple[int, int]] = []

    async def measure() -> None:
        while time.monotonic() < until:
            await asyncio.sleep(min(SETTLE_S, max(1.0, until - time.monotonic())))
            with contextlib.suppress(psutil.Error, OSError):
                sizes.append(churn.size())

    try:
        await churn.connect()
        churn.up.set()
        workers = [churn.work(until) for _ in range(WORKERS)]
        await asyncio.gather(*workers, churn.restart_now_and_then(until), measure())
        await churn.compare()
        for name in list(churn.known):
            await churn.forget(name)
        sizes.append(churn.size())
    finally:
        if churn.channel is not None:
            await churn.channel.close(None)
        left = await asyncio.to_thread(end, churn)
        sys.stderr.write(churn.daemon_now().log)
        shutil.rmtree(churn.directory)
    leaked = leaks.wait_for_leaks(before).describe()
    return {
        "minutes": minutes, "seed": seed, "operations": sum(churn.done.values()), "done": dict(churn.done),
        "failures": dict(churn.failed), "wrong": churn.wrong,
        "leaks": len(left) + len(leaked), "leaked": [*left, *leaked],
        "agent_mib_start": sizes[0][0] >> 20, "agent_mib_end": sizes[-1][0] >> 20,
        "descriptors_start": sizes[0][1], "descriptors_end": sizes[-1][1],
    }  # fmt: skip


def main() -> int:
    """Prints the figures as JSON; ends with 1 if anything was lost, wrong or left."""
    parser = argparse.ArgumentParser(prog="just churn", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    os.environ.setdefault(leaks.MARK, str(os.getpid()))
    figures = asyncio.run(run(options.minutes, options.seed))
    print(json.dumps(figures, indent=1))
    return 1 if figures["wrong"] or figures["leaks"] else 0


if __name__ == "__main__":
    sys.exit(main())
