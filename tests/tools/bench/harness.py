"""What every benchmark shares: series of samples, a daemon with one sandbox, and the two ways of printing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Column, Table

from sandboxd.v1 import node_pb2, sandbox_pb2
from tests.support import leaks
from tests.support.client import MIB, Client
from tests.support.daemon import Daemon, connected, start_daemon
from tests.tools.bench.figures import Figure


def percentile(samples: list[float], percent: float) -> float:
    """Returns the sample below which `percent` of all lie (nearest rank)."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@dataclass
class Report:
    """What a run is to measure, and what it measured.

    :param series: samples by name, which the table shows with their spread.
    :param figures: the results by name, as the bench modules declare them.
    :param rounds: how often each thing is measured.
    :param small: the sizes are those of a smoke test.
    """

    series: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    machine: dict[str, object] = field(default_factory=dict)
    rounds: int = 0
    small: bool = False

    def add(self, name: str, sample: float) -> None:
        """Adds one sample to a series."""
        self.series.setdefault(name, []).append(sample)

    def median(self, name: str) -> float:
        """Returns the median of a series."""
        return statistics.median(self.series[name])

    def print_json(self, bench: str) -> None:
        """Prints the one object that a program reads."""
        figures = {name: round(value, 4) for name, value in self.figures.items()}
        facts = {"bench": bench, "rounds": self.rounds, "small": self.small, "machine": self.machine}
        print(json.dumps({**facts, "figures": figures}))

    def print_table(self, bench: str, declared: Iterable[Figure]) -> None:
        """Print the figures, then the series behind them."""
        console = Console()
        facts = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        sizes = "small sizes, which say nothing about speed; " if self.small else ""
        console.print(f"{bench}: {self.rounds} rounds; {sizes}{facts}")
        figures = Table(Column("figure", no_wrap=True), "value", "unit", "meaning")
        for one in declared:
            figures.add_row(one.name, f"{self.figures[one.name]:.3f}", one.unit, one.meaning)
        console.print(figures)
        table = Table("measured", "median", "5 %", "95 %", "samples")
        for name, samples in self.series.items():
            spread = (percentile(samples, 5), percentile(samples, 95))
            table.add_row(name, f"{self.median(name):.3f}", *(f"{end:.3f}" for end in spread), str(len(samples)))
        console.print(table)


@dataclass(frozen=True)
class Target:
    """A sandbox to measure, and how to reach it."""

    daemon: Daemon
    client: Client
    id: str
    report: Report

    @property
    def run_dir(self) -> Path:
        """Where the VMM's sockets are."""
        return self.daemon.run_dir / "vm" / self.id


@asynccontextmanager
async def own_daemon(**settings: str) -> AsyncIterator[tuple[Daemon, Client]]:
    """A daemon that logs little, and a client to it; gone in the end."""
    directory = leaks.make_directory()
    try:
        daemon = start_daemon(directory, **{"log__level": "warning", **settings})
        try:
            async with connected(daemon) as client:
                yield daemon, client
        finally:
            daemon.stop()
            sys.stderr.write(daemon.log)
    finally:
        shutil.rmtree(directory)


@asynccontextmanager
async def target(report: Report) -> AsyncIterator[Target]:
    """A fresh sandbox of the minimal image on a daemon of its own."""
    async with own_daemon() as (daemon, client), client.sandbox(memory_bytes=512 * MIB) as sandbox:
        await describe_machine(report, client)
        yield Target(daemon, client, sandbox.id, report)


async def describe_machine(report: Report, client: Client) -> None:
    """Notes what the figures were measured on."""
    node = await client.nodes.GetNode(node_pb2.GetNodeRequest())
    report.machine = {
        "cpu": node.cpu_model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30)),
        "kernel": platform.release(),
        "vmm": f"{node.vmm} {node.vmm_version} ({node.accelerator})",
    }


async def delete(client: Client, sandbox_id: str) -> None:
    """Deletes a sandbox."""
    await client.sandboxes.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=sandbox_id))
