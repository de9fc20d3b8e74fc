"""What a guest can do to itself and not to others: bombs, floods, and an end that nobody asked for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from sandboxd.v1 import sandbox_pb2 as pb
from tests.integration.test_failure import failed_within, vmm_of
from tests.support.client import MIB, Client, Result
from tests.support.daemon import Daemon, refused
from tests.tools.reliability import Reliability

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

FORK_BOMB = "f() { f | f & }; f; sleep 3"
MEMORY_BOMB = "kept = []\nwhile True:\n    kept.append(bytearray(1 << 22))"
AGENT_MAY_GROW = 64 * MIB


@pytest.fixture(scope="module")
def sandbox_fields() -> dict[str, Any]:
    """The bystander's, in which nothing may be noticed."""
    return {"memory_bytes": 256 * MIB}


async def answers(client: Client, sandbox_id: str) -> float:
    """Returns how long an exec took."""
    start = time.monotonic()
    assert (await client.run(sandbox_id, "true")).code == 0
    return time.monotonic() - start


def agent_bytes(daemon: Daemon) -> int:
    return int(psutil.Process(daemon.process.pid).memory_info().rss)


async def tried(client: Client, sandbox_id: str, *argv: str, seconds: float, user: str = "") -> Result | None:
    """Has a guest do something for a while; None if it was still at it then."""
    with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
        async with asyncio.timeout(seconds):
            return await client.run(sandbox_id, *argv, user=user)
    return None


ATTACKS: dict[str, tuple[tuple[str, ...], str, float]] = {
    "fork bomb": (("sh", "-c", FORK_BOMB), "", 6.0),
    "memory bomb": (("python3", "-c", MEMORY_BOMB), "", 20.0),
    "disk bomb": (("sh", "-c", "cat /dev/zero > /home/sandbox/full; sync"), "", 20.0),
    "console flood": (("sh", "-c", "yes flood > /dev/console"), "root", 5.0),
    "output that nobody reads": (("sh", "-c", "yes > /dev/null & yes & yes >&2 & sleep 4; kill %1 %2 %3"), "", 6.0),
    "10,000 short processes": (("sh", "-c", "i=0; while [ $i -lt 10000 ]; do i=$((i+1)); (:) & done; wait"), "", 15.0),
}


# What shows that it was one.
HAPPENED: dict[str, Callable[[Result | None], bool]] = {
    "fork bomb": lambda result: result is None,
    "memory bomb": lambda result: result is not None and result.exit.oom_killed,
    "disk bomb": lambda result: result is not None and b"No space left" in result.stderr,
    "console flood": lambda result: result is None,
    "output that nobody reads": lambda result: result is None or len(result.stdout) > MIB,
    "10,000 short processes": lambda result: result is None or result.code == 0,
}


@pytest.mark.parametrize("name", ATTACKS)
async def test_a_guest_harms_nobody_else(
    name: str, client: Client, daemon: Daemon, sandbox: pb.Sandbox, reliability: Reliability
) -> None:
    argv, user, seconds = ATTACKS[name]
    before = agent_bytes(daemon)
    async with client.sandbox(disk_bytes=64 * MIB) as attacker:
        doing = asyncio.create_task(tried(client, attacker.id, *argv, seconds=seconds, user=user))
        slowest = await client.slowest_beside(sandbox.id, doing, pause_s=0.2)
        assert HAPPENED[name](doing.result()), doing.result()
        grown = agent_bytes(daemon) - before
        assert grown < AGENT_MAY_GROW
        console = daemon.run_dir / "vm" / attacker.id
        written = sum(path.stat().st_size for path in console.glob("console.log*"))
        assert written <= 2 * MIB
        disk = (daemon.directory / "state" / "sandboxes" / attacker.id / "data.img").stat()
        assert disk.st_blocks * 512 <= 65 * MIB
        start = time.monotonic()
    deleted = time.monotonic() - start
    assert not any(attacker.id in path for path in daemon.left())
    assert await answers(client, sandbox.id) < 10
    reliability.seen(
        f"guest: {name}",
        "other sandboxes answer, the agent's memory and the host's disk are bounded, and a delete leaves nothing",
        f"another's exec took {slowest:.1f} s at most; agent {max(0, grown) >> 20} MiB more; gone in {deleted:.1f} s",
    )


async def test_a_memory_bomb_is_told_from_other_ends(client: Client, sandbox: pb.Sandbox) -> None:
    result = await client.run(sandbox.id, "python3", "-c", MEMORY_BOMB)
    assert (result.exit.signal, result.exit.oom_killed) == ("SIGKILL", True)
    assert (await client.run(sandbox.id, "sh", "-c", "kill -9 $$")).exit.oom_killed is False


async def test_a_vmm_that_is_stopped_and_goes_on(
    client: Client, sandbox: pb.Sandbox, daemon: Daemon, reliability: Reliability
) -> None:
    async with client.sandbox() as frozen, client.sandbox() as doomed:
        for one in (frozen, doomed):
            vmm_of(one.id).send_signal(signal.SIGSTOP)
        waiting = asyncio.create_task(client.run(frozen.id, "echo", "late"))
        assert await answers(client, sandbox.id) < 10
        start = time.monotonic()
        await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=doomed.id))
        deleted = time.monotonic() - start
        assert not waiting.done()
        vmm_of(frozen.id).send_signal(signal.SIGCONT)
        assert (await asyncio.wait_for(waiting, 20)).stdout == b"late\n"
    reliability.seen(
        "SIGSTOP of a VMM",
        "others answer; it can be deleted; within 30 s it may go on as if nothing had been; after that it has FAILED",
        f"all so; deleted in {deleted:.1f} s",
    )


@pytest.mark.parametrize(("how", "words"), [("reboot -f", "exited"), ("poweroff -f", "exited")])
async def test_a_guest_that_ends_itself(client: Client, how: str, words: str) -> None:
    del words
    async with client.sandbox() as made:
        script = f"import ctypes; ctypes.CDLL(None).reboot({0x01234567 if 'reboot' in how else 0x4321FEDC})"
        await tried(client, made.id, "python3", "-c", script, seconds=5, user="root")
        failed = await failed_within(client, made.id, 10)
        assert "the virtual machine is gone" in failed.error


async def test_a_thousand_creates_of_which_most_are_refused(
    client: Client, daemon: Daemon, sandbox: pb.Sandbox, reliability: Reliability
) -> None:
    """Each asks for half of the node, so one at a time has room at most."""
    del sandbox
    memory = psutil.virtual_memory().total // 2 // MIB * MIB
    before, descriptors = agent_bytes(daemon), len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
    request = pb.CreateSandboxRequest(memory_bytes=memory * 2)
    start = time.monotonic()

    async def create() -> grpc.StatusCode:
        try:
            await client.sandboxes.CreateSandbox(request)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    codes = await asyncio.gather(*(create() for _ in range(1000)))
    took = time.monotonic() - start
    assert set(codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert agent_bytes(daemon) - before < AGENT_MAY_GROW
    assert len(os.listdir(f"/proc/{daemon.process.pid}/fd")) <= descriptors + 8  # of threads that will be reused
    reliability.seen(
        "1,000 creates at once for which there is no room",
        "each is refused with what lacks; memory and descriptors of the agent are flat",
        f"so in {took:.1f} s",
    )


async def test_ten_thousand_idle_watches(client: Client, daemon: Daemon, reliability: Reliability) -> None:
    before = agent_bytes(daemon)
    async with contextlib.AsyncExitStack() as stack:
        calls: list[Any] = []
        request = pb.WatchSandboxesRequest(id="sbx-0000000000000000")
        for _ in range(40):
            some: list[Any] = [client.sandboxes.WatchSandboxes(request) for _ in range(250)]
            for call in some:
                stack.callback(call.cancel)
            synced = await asyncio.gather(*(call.read() for call in some))
            assert {event.type for event in synced} == {pb.SandboxEvent.TYPE_SYNCED}
            calls += some
        assert not any(call.done() for call in calls)
        grown = agent_bytes(daemon) - before
        async with client.sandbox() as made:
            took = await answers(client, made.id)
        assert not any(call.done() for call in calls)
    with refused(grpc.StatusCode.NOT_FOUND, "SANDBOX_NOT_FOUND"):
        await client.sandboxes.GetSandbox(pb.GetSandboxRequest(id=made.id))
    reliability.seen(
        "10,000 watches that wait", "creates and execs go on", f"exec in {took:.1f} s; agent {grown >> 20} MiB more"
    )


def test_the_page_has_a_row_for_each_fault_test() -> None:
    """docs/reliability.md comes from a run of these tests; one that was added must be run for it, too."""
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    for source in Path(__file__).parents[1].glob("*/test_*.py"):
        functions = re.split(r"\n(?:async )?def ", source.read_text())[1:]
        for function in functions:
            name = function.partition("(")[0]
            if re.search(r"^ +reliability\.seen\($", function, re.MULTILINE) and name.startswith("test_"):
                assert f"`{name}`" in page, f"{name}: just reliability"
