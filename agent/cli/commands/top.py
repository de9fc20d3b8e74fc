"""`top`: CPU, memory, disk and network use of running sandboxes, refreshed until Ctrl-C."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.cli import formatting, options, output
from agent.cli.commands.sandbox import list_sandboxes
from agent.cli.connect import connected
from agent.common.api_client import Api
from agent.common.model import State

if TYPE_CHECKING:
    import asyncio

    from sandboxd.v1.sandbox_pb2 import SandboxStats

_CONCURRENT_CALLS = 16
_HEADERS = (
    "ID", "CPU%", "HOST MEM", "GUEST MEM", "DISK", "READ/S", "WRITTEN/S", "RECEIVED/S", "SENT/S", "LOAD", "PROCS", "UP",
)  # fmt: skip
_COUNTERS = ("disk_read_bytes", "disk_written_bytes", "net_received_bytes", "net_sent_bytes")


@dataclass(frozen=True, slots=True)
class _Sample:
    """Statistics of a sandbox, and the local monotonic time when they arrived."""

    stats: SandboxStats
    at_s: float


Samples = dict[str, _Sample]


async def top(
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]...", help="Sandbox ids. Default: all running ones.", show_default=False),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one table and exit.")] = False,
    interval: Annotated[
        float,
        typer.Option(
            parser=options.parse_duration, metavar="TIME", help="Refresh interval, such as 500ms. Default: 2s."
        ),
    ] = 2.0,
) -> None:
    """Show the resource use of running sandboxes.

    Refresh CPU, memory, disk and network use until Ctrl-C.
    """
    import asyncio

    if interval < 0.1:
        raise typer.BadParameter("--interval must be at least 100ms")
    async with connected() as api:
        before = await _sample_all(api, ids)
        live = None if once or output.json_enabled() or not sys.stdout.isatty() else _start_live()
        try:
            while True:
                await asyncio.sleep(interval)
                now = await _sample_all(api, ids)
                _show(before, now, live)
                if once:
                    return
                before = now
        finally:
            if live is not None:
                live.stop()


def _start_live() -> Any:
    from rich.live import Live

    live = Live(auto_refresh=False)
    live.start()
    return live


async def _sample_all(api: Api, ids: list[str] | None) -> Samples:
    """Return samples by sandbox id. Without `ids`, sample all running sandboxes and skip those that end meanwhile."""
    import asyncio

    chosen = ids or [sandbox.id async for sandbox in list_sandboxes(api, {}, [State.RUNNING])]
    limit = asyncio.Semaphore(_CONCURRENT_CALLS)
    samples = await asyncio.gather(*(_sample(api, sandbox_id, limit, strict=bool(ids)) for sandbox_id in chosen))
    return {sandbox_id: sample for sandbox_id, sample in zip(chosen, samples, strict=True) if sample is not None}


async def _sample(api: Api, sandbox_id: str, limit: asyncio.Semaphore, *, strict: bool) -> _Sample | None:
    import grpc

    from sandboxd.v1 import sandbox_pb2

    gone = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION)
    async with limit:
        try:
            stats = await api.sandboxes.GetSandboxStats(sandbox_pb2.GetSandboxStatsRequest(id=sandbox_id))
        except grpc.aio.AioRpcError as error:
            if strict or error.code() not in gone:
                raise
            return None
        return _Sample(stats, time.monotonic())


def cpu_percent(before: float, after: float, span_s: float) -> float | None:
    """Return CPU use in percent of one CPU from the CPU seconds before and after a span; None if it is unknown."""
    return max(0.0, (after - before) / span_s * 100) if span_s > 0 and after > 0 else None


def rate(before: int, after: int, span_s: float) -> float | None:
    """Return the increase of a counter per second; None if it fell, since a new VMM restarts its counters at 0."""
    return (after - before) / span_s if span_s > 0 and after >= before else None


@dataclass(frozen=True, slots=True)
class _Usage:
    """Use of a sandbox between two samples.

    :param cpu_percent: percent of one CPU; None if unknown.
    :param rates: bytes per second for each of `_COUNTERS`; None if unknown.
    """

    cpu_percent: float | None = None
    rates: tuple[float | None, ...] = (None,) * len(_COUNTERS)


def _usage(before: Samples, sandbox_id: str, sample: _Sample) -> _Usage:
    earlier = before.get(sandbox_id)
    if earlier is None:
        return _Usage()
    span_s = sample.at_s - earlier.at_s
    cpu_s = [one.stats.vmm_cpu.seconds + one.stats.vmm_cpu.nanos / 1e9 for one in (earlier, sample)]
    counts = [(getattr(earlier.stats, name), getattr(sample.stats, name)) for name in _COUNTERS]
    return _Usage(cpu_percent(cpu_s[0], cpu_s[1], span_s), tuple(rate(*pair, span_s) for pair in counts))


def _show(before: Samples, now: Samples, live: Any) -> None:
    used = {sandbox_id: _usage(before, sandbox_id, sample) for sandbox_id, sample in now.items()}
    if output.json_enabled():
        for sandbox_id, sample in now.items():
            usage = used[sandbox_id]
            rates = {f"{name}_per_s": value for name, value in zip(_COUNTERS, usage.rates, strict=True)}
            output.print_json(
                {"id": sandbox_id, "cpu_percent": usage.cpu_percent, **rates, **output.to_json(sample.stats)}
            )
        return
    rows = [_row(sandbox_id, sample.stats, used[sandbox_id]) for sandbox_id, sample in now.items()]
    if live is not None:
        live.update(output.rich_table(_HEADERS, rows), refresh=True)
    else:
        output.print_table(_HEADERS, rows)


def _row(sandbox_id: str, stats: SandboxStats, usage: _Usage) -> tuple[str, ...]:
    used = stats.memory_total_bytes - stats.memory_available_bytes
    disk = stats.disk_total_bytes - stats.disk_available_bytes
    cpu = "-" if usage.cpu_percent is None else f"{usage.cpu_percent:.0f}"
    rates = ("-" if value is None else formatting.size(round(value)) for value in usage.rates)
    return (
        sandbox_id, cpu, formatting.size(stats.vmm_pss_bytes), formatting.size(used), formatting.size(disk), *rates,
        f"{stats.load1:.2f}", str(stats.process_count), formatting.duration(stats.uptime.seconds),
    )  # fmt: skip
