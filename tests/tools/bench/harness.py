"""What every benchmark shares: series of samples, a daemon with one sandbox, and the two ways of printing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from sandboxd.v1 import node_pb2, sandbox_pb2
from tests.support import leaks
from tests.support.client import MIB, Client
from tests.support.daemon import Daemon, connected, start_daemon


def percentile(samples: list[float], percent: float) -> float:
    """Returns the sample below which `percent` of all lie (nearest rank)."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@dataclass
class Report:
    """Figures by name. `series` are samples that the table shows with their spread; `figures` are what --json gives."""

    series: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    machine: dict[str, object] = field(default_factory=dict)
    rounds: int = 0

    def add(self, name: str, sample: float) -> None:
        """Adds one sample to a series."""
        self.series.setdefault(name, []).append(sample)

    def median(self, name: str) -> float:
        """Returns the median of a series."""
        return statistics.median(self.series[name])

    def print_json(self, bench: str) -> None:
        """Prints the one object that a program reads."""
        figures = {name: round(value, 4) for name, value in self.figures.items()}
        print(json.dumps({"bench": bench, "rounds": self.rounds, "machine": self.machine, "figures": figures}))

    def print_table(self, bench: str) -> None:
        """Prints the figures, then the series behind them."""
        console = Console()
        facts = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        console.print(f"{bench}: {self.rounds} rounds; {facts}")
        figures = Table("figure", "value")
        for name, value in self.figures.items():
            figures.add_row(name, f"{value:.3f}")
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
    rounds: int

    @property
    def run_dir(self) -> Path:
        """Where the VMM's sockets are."""
        return self.daemon.run_dir / "vm" / self.id


@asynccontextmanager
async def own_daemon(**settings: str) -> AsyncIterator[tuple[Daemon, Client]]:
    """A daemon that logs little, and a client to it; gone in the end."""
    directory = Path(tempfile.mkdtemp(prefix=leaks.PREFIX))
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
async def target(report: Report, rounds: int) -> AsyncIterator[Target]:
    """A fresh sandbox of the minimal image on a daemon of its own."""
    async with own_daemon() as (daemon, client), client.sandbox(memory_bytes=512 * MIB) as sandbox:
        await describe_machine(report, client)
        yield Target(daemon, client, sandbox.id, report, rounds)


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
