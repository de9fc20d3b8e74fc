"""Resources of the node: total, allocatable, allocated and used; and the check whether sandboxes fit."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from agent.common.background import Supervisor
from agent.common.config.settings import Settings
from agent.common.model import SandboxSpec
from agent.daemon.vmm.driver import VmmInfo


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind of resource; see the message `Resource` in node.proto."""

    total: int
    allocatable: int
    allocated: int
    used: int


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """State of the node.

    :param cpu: in thousandths of a CPU. `memory` and `disk` are in bytes.
    :param draining: why the node admits no sandboxes; "" if it does.
    :param degraded: what this host lacks, and which background loops fail, a sentence each.
    """

    name: str
    region: str
    labels: dict[str, str]
    vmm: VmmInfo
    cpu: Resource
    memory: Resource
    disk: Resource
    sandboxes: Resource
    start_time: float
    kernel: str
    cpu_model: str
    draining: str
    degraded: tuple[str, ...]


class Node:
    """Facts about this node. `draining` says why it admits no sandboxes, "" if it does.

    `on_change` has callbacks for each change of `draining` and of the settings, and for background loops that fail or
    recover.

    :param degraded: what this host lacks, a sentence each.
    """

    def __init__(
        self, settings: Settings, vmm: VmmInfo, supervisor: Supervisor, degraded: tuple[str, ...] = ()
    ) -> None:
        self._degraded = degraded
        self._supervisor = supervisor
        supervisor.on_change.add(self._notify)
        self._settings = settings
        self._vmm = vmm
        self._start_time = time.time()
        self._cpu_model = _cpu_model()
        self.draining = ""
        self.on_change: set[Callable[[], None]] = set()

    def reconfigure(self, settings: Settings) -> None:
        """Apply other limits and labels from now on."""
        self._settings = settings
        self._notify()

    def set_draining(self, why: str) -> None:
        """Admit no more sandboxes, for the reason `why`; "" admits them again."""
        self.draining = why
        self._notify()

    def _notify(self) -> None:
        for notify in self.on_change:
            notify()

    def lacking(self, wanted: Sequence[SandboxSpec], reserved: Sequence[SandboxSpec]) -> list[str]:
        """Return the resources that are short for `wanted` beside `reserved`, each with the rest; [] if they fit."""
        info = self.describe(reserved)
        lacking = [
            f"{name}: {need} wanted, {max(0, resource.allocatable - resource.allocated)} left"
            for name, need, resource in (
                ("sandboxes", len(wanted), info.sandboxes),
                ("cpu_millis", sum(spec.vcpu_count for spec in wanted) * 1000, info.cpu),
                ("memory_bytes", sum(spec.memory_bytes for spec in wanted), info.memory),
            )
            if resource.allocated + need > resource.allocatable
        ]
        # Disks are sparse, so only the host's free space counts, not the sum of their sizes.
        if info.disk.total - info.disk.used < self._settings.node.reserved_disk_bytes:
            lacking.append(f"disk: less than {self._settings.node.reserved_disk_bytes} bytes are free on the host")
        return lacking

    def describe(self, reserved: Iterable[SandboxSpec]) -> NodeInfo:
        """Return the state of the node now.

        :param reserved: specifications of all sandboxes that occupy CPU and memory.
        """
        specs = list(reserved)
        node = self._settings.node
        memory = psutil.virtual_memory()
        cpus = os.cpu_count() or 1
        cpu_total = cpus * 1000
        usable = max(0, memory.total - node.reserved_memory_bytes)
        return NodeInfo(
            name=node.name,
            region=node.region,
            labels=dict(node.labels),
            vmm=self._vmm,
            cpu=Resource(
                cpu_total, int(cpu_total * node.cpu_overcommit), sum(spec.vcpu_count for spec in specs) * 1000,
                int(psutil.cpu_percent() * cpus * 10),
            ),
            memory=Resource(
                memory.total, int(usable * node.memory_overcommit), sum(spec.memory_bytes for spec in specs),
                memory.total - memory.available,
            ),
            disk=self._disk(sum(spec.disk_bytes for spec in specs)),
            sandboxes=Resource(node.max_sandboxes, node.max_sandboxes, len(specs), len(specs)),
            start_time=self._start_time,
            kernel=platform.release(),
            cpu_model=self._cpu_model,
            draining=self.draining,
            degraded=(*self._degraded, *self._supervisor.sentences()),
        )  # fmt: skip

    def _disk(self, allocated: int) -> Resource:
        usage = shutil.disk_usage(self._settings.paths.state_dir)
        allocatable = max(0, usage.total - self._settings.node.reserved_disk_bytes)
        return Resource(usage.total, allocatable, allocated, usage.total - usage.free)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
