"""From CreateSandbox to the first byte of a program: against a cold boot, and against a bare script without an agent.

The three take turns, so that what else the machine does meets all of them. The bare script is `bareclone`: it spawns
the same VMM, restores the same template, and asks the guest for the same configuration and program.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psutil

from sandboxd.v1 import node_pb2, process_pb2, sandbox_pb2
from tests.support.client import MIB, Client
from tests.tools.bench import bareclone
from tests.tools.bench.figures import Figure, Range
from tests.tools.bench.harness import Report, delete, describe_machine, own_daemon, percentile

FIGURES: tuple[Figure, ...] = (
    Figure("create_ms_p50", "ms", "CreateSandbox to the first byte of echo, one CPU, median"),
    Figure("create_ms_p95", "ms", "CreateSandbox to the first byte of echo, one CPU, 95th percentile"),
    Figure("create_2cpu_ms_p50", "ms", "CreateSandbox to the first byte of echo, two CPUs, median"),
    Figure("create_vs_bare", "ratio", "a create, over a script that restores the same template without an agent"),
    Figure("agent_share_ms_p50", "ms", "of a create, what neither VMM nor guest took, median", range=Range.DIFFERENCE),
    Figure("agent_share_ms_p99", "ms", "of a create, what neither VMM nor guest took, 99th percentile",
           range=Range.DIFFERENCE),
    Figure("cold_boot_ms_p50", "ms", "a create without a template to the first byte of echo, median"),
    Figure("clone_pss_mib", "MiB", "proportional memory of a clone, of 30"),
    Figure("burst32_failed", "sandboxes", "creates that failed, of 32 at once", range=Range.COUNT),
)  # fmt: skip
MEMORY_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True)
class _Sizes:
    """:param at_once: how many creates at one time, the burst last. :param clones: how many clones share memory."""

    at_once: tuple[int, ...]
    clones: tuple[int, ...]


_SIZES, _SMALL_SIZES = _Sizes((1, 8, 32), (1, 10, 30)), _Sizes((2,), (2,))
_ECHO = ("/bin/echo", "hi")
_ROOM = {"node__cpu_overcommit": "64", "node__memory_overcommit": "4"}
# The phases of a create in which the VMM or the guest is at work; all else is the agent's own share.
_NOT_AGENT = ("vmm.start", "vmm.restore", "guest.boot", "guest.answer", "guest.configure", "guest.clock_sync")


def _spec(vcpus: int) -> sandbox_pb2.CreateSandboxRequest:
    return sandbox_pb2.CreateSandboxRequest(image="minimal", vcpus=vcpus, memory_bytes=MEMORY_BYTES)


async def _first_byte(client: Client, sandbox_id: str) -> None:
    """Returns at the first byte that a program in the sandbox has written."""
    start = process_pb2.ExecRequest.Start(sandbox_id=sandbox_id, spec=process_pb2.ProcessSpec(argv=_ECHO))

    async def messages() -> AsyncIterator[process_pb2.ExecRequest]:
        yield process_pb2.ExecRequest(start=start)

    seen = False
    async for response in client.processes.Exec(messages()):
        seen = seen or response.stdout == b"hi\n"
    assert seen


async def _create(client: Client, vcpus: int = 1) -> tuple[sandbox_pb2.Sandbox, float, float]:
    """Returns (sandbox, seconds until it is there, seconds until the first byte)."""
    begun = time.perf_counter()
    sandbox = await client.sandboxes.CreateSandbox(_spec(vcpus))
    created = time.perf_counter()
    await _first_byte(client, sandbox.id)
    return sandbox, created - begun, time.perf_counter() - begun


def _phases(sandbox: sandbox_pb2.Sandbox) -> dict[str, float]:
    """Returns the milliseconds of each step; "create" is all of them."""
    return {
        phase.name: phase.duration.ToTimedelta().total_seconds() * 1000
        for phase in sandbox.phases
        if phase.name != "create"
    }


def agent_share(phases: dict[str, float], created_s: float) -> float:
    """Returns the milliseconds of a create in which neither VMM nor guest was at work."""
    return created_s * 1000 - sum(phases.get(name, 0.0) for name in _NOT_AGENT)


async def _warm(client: Client, vcpus: int) -> None:
    """Makes the template that creates will use before anything is measured."""
    request = node_pb2.PrepareTemplateRequest(image="minimal", vcpus=vcpus, memory_bytes=MEMORY_BYTES)
    await client.templates.PrepareTemplate(request)


@asynccontextmanager
async def _many(client: Client, count: int) -> AsyncIterator[list[sandbox_pb2.Sandbox | BaseException]]:
    """That many sandboxes, asked for at once; what failed is the exception."""
    made = await asyncio.gather(
        *(client.sandboxes.CreateSandbox(_spec(1)) for _ in range(count)), return_exceptions=True
    )
    try:
        yield made
    finally:
        ids = [one.id for one in made if not isinstance(one, BaseException)]
        await asyncio.gather(*(delete(client, sandbox_id) for sandbox_id in ids))


async def _series(report: Report) -> None:
    """Cold boots, bare clones, and creates, in turns."""
    async with (
        own_daemon(**_ROOM) as (daemon, client),
        own_daemon(templates__enabled="false", **_ROOM) as (_, cold_client),
    ):
        await describe_machine(report, client)
        await _warm(client, 1)
        await _warm(client, 2)
        bare = bareclone.BareClone(daemon)
        for _ in range(report.rounds):
            sandbox, _, seconds = await _create(cold_client)
            report.add("cold boot to first byte, ms", seconds * 1000)
            await delete(cold_client, sandbox.id)
            for name, milliseconds in (await bare.run()).items():
                report.add(f"bare: {name}, ms", milliseconds)
            sandbox, created, seconds = await _create(client)
            report.add("create to first byte, ms", seconds * 1000)
            phases = _phases(sandbox)
            report.add("the agent's own share, ms", agent_share(phases, created))
            for name, milliseconds in phases.items():
                report.add(f"phase: {name}, ms", milliseconds)
            report.add("phase: first byte of echo, ms", (seconds - created) * 1000)
            await delete(client, sandbox.id)
            sandbox, _, seconds = await _create(client, vcpus=2)
            report.add("create to first byte, 2 CPUs, ms", seconds * 1000)
            await delete(client, sandbox.id)


async def _at_once(report: Report, counts: tuple[int, ...]) -> None:
    async with own_daemon(**_ROOM) as (_, client):
        await _warm(client, 1)
        for count in counts:
            begun = time.perf_counter()
            async with _many(client, count) as made:
                report.add(f"{count} at once, all there, ms", (time.perf_counter() - begun) * 1000)
                failed = sum(isinstance(one, BaseException) for one in made)
        report.figures["burst32_failed"] = failed


async def _memory(report: Report, counts: tuple[int, ...]) -> None:
    """Proportional set sizes: shared pages count by their share."""
    for count in counts:
        async with own_daemon(**_ROOM) as (daemon, client):
            await _warm(client, 1)
            async with _many(client, count) as made:
                ids = {one.id for one in made if not isinstance(one, BaseException)}
                await asyncio.gather(*(_first_byte(client, sandbox_id) for sandbox_id in ids))
                clones = [
                    process for process in psutil.process_iter(["cmdline"])
                    if any(sandbox_id in " ".join(process.info["cmdline"] or []) for sandbox_id in ids)
                ]  # fmt: skip
                sizes = [await asyncio.to_thread(process.memory_full_info) for process in clones]
                report.add(f"memory of a clone, {count} there, MiB", sum(size.pss for size in sizes) / MIB / len(ids))
                agent = psutil.Process(daemon.process.pid).memory_full_info()
                report.add(f"memory of the agent, {count} clones, MiB", agent.pss / MIB)


async def measure(report: Report) -> None:
    """Measure creates; see FIGURES."""
    sizes = _SMALL_SIZES if report.small else _SIZES
    await _series(report)
    await _at_once(report, sizes.at_once)
    await _memory(report, sizes.clones)
    creates, shares = (report.series[name] for name in ("create to first byte, ms", "the agent's own share, ms"))
    report.figures |= {
        "create_ms_p50": percentile(creates, 50),
        "create_ms_p95": percentile(creates, 95),
        "create_2cpu_ms_p50": report.median("create to first byte, 2 CPUs, ms"),
        "create_vs_bare": report.median("create to first byte, ms") / report.median("bare: total, ms"),
        "agent_share_ms_p50": percentile(shares, 50),
        "agent_share_ms_p99": percentile(shares, 99),
        "cold_boot_ms_p50": report.median("cold boot to first byte, ms"),
        "clone_pss_mib": report.median(f"memory of a clone, {sizes.clones[-1]} there, MiB"),
    }
