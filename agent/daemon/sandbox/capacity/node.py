"""What the node has, has promised, and uses; and what it lacks for one more sandbox."""

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
    """One kind of resource; see the message of the same name in node.proto."""

    total: int
    allocatable: int
    allocated: int
    used: int


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """The node now; CPU in thousandths, memory and disk in bytes."""

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
    draining: str  # why it takes no sandboxes, "" if it does
    degraded: tuple[str, ...]  # what this host lacks, and which background loops fail, a sentence each


class Node:
    """Facts. `specs` are those of all sandboxes that hold resources. :param degraded: what this host lacks."""

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
        # Called when it begins or ends to take sandboxes, and when a background loop fails or recovers.
        self.on_change: set[Callable[[], None]] = set()

    def reconfigure(self, settings: Settings) -> None:
        """Takes other limits and labels from now on."""
        self._settings = settings
        self._notify()

    def set_draining(self, why: str) -> None:
        """Takes no more sandboxes; "" takes them again."""
        self.draining = why
        self._notify()

    def _notify(self) -> None:
        for notify in self.on_change:
            notify()

    def lacking(self, wanted: Sequence[SandboxSpec], held: Sequence[SandboxSpec]) -> list[str]:
        """Returns what the node has too little of for these besides those that are held: each with what is left."""
        info = self.describe(held)
        lacking = [
            f"{name}: {need} wanted, {max(0, resource.allocatable - resource.allocated)} left"
            for name, need, resource in (
                ("sandboxes", len(wanted), info.sandboxes),
                ("cpu_millis", sum(spec.vcpu_count for spec in wanted) * 1000, info.cpu),
                ("memory_bytes", sum(spec.memory_bytes for spec in wanted), info.memory),
            )
            if resource.allocated + need > resource.allocatable
        ]
        # Disks are sparse: what counts is that the host keeps its reserve.
        if info.disk.total - info.disk.used < self._settings.node.reserved_disk_bytes:
            lacking.append(f"disk: less than {self._settings.node.reserved_disk_bytes} bytes are free on the host")
        return lacking

    def describe(self, specs: Iterable[SandboxSpec]) -> NodeInfo:
        """Returns the node as it is now."""
        held = list(specs)
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
                cpu_total, int(cpu_total * node.cpu_overcommit), sum(spec.vcpu_count for spec in held) * 1000,
                int(psutil.cpu_percent() * cpus * 10),
            ),
            memory=Resource(
                memory.total, int(usable * node.memory_overcommit), sum(spec.memory_bytes for spec in held),
                memory.total - memory.available,
            ),
            disk=self._disk(sum(spec.disk_bytes for spec in held)),
            sandboxes=Resource(node.max_sandboxes, node.max_sandboxes, len(held), len(held)),
            start_time=self._start_time,
            kernel=platform.release(),
            cpu_model=self._cpu_model,
            draining=self.draining,
            degraded=(*self._degraded, *self._supervisor.sentences()),
        )  # fmt: skip

    def _disk(self, promised: int) -> Resource:
        usage = shutil.disk_usage(self._settings.paths.state_dir)
        allocatable = max(0, usage.total - self._settings.node.reserved_disk_bytes)
        return Resource(usage.total, allocatable, promised, usage.total - usage.free)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
