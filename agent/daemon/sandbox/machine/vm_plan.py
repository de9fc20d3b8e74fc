"""Plan of one VM: a frozen value, complete before anything on the host is made.

`agent.daemon.sandbox.machine.resources` allocates the host resources; `vm_spec` turns the plan into the driver's input.
There are four kinds of plan, told apart by their memory source: a cold boot, a clone of a template, the restore of a
saved sandbox, and the VM that becomes a template.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from agent.common.config.paths import Paths
from agent.common.model import GUEST_MAC, TAP_NAME
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.vm_shape import DATA_DISK, TEMPLATE_DISK_BYTES, Shape, volume_serial
from agent.daemon.sandbox.state.record import Record
from agent.daemon.storage.images import Image
from agent.daemon.storage.volumes import is_snapshot
from agent.daemon.vmm.driver import DiskSpec, LinkKind, MemoryFile, NicSpec, RateLimits, VmSpec

_CONSOLE_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FreshMemory:
    """Anonymous memory; the VM boots its kernel."""


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """A file that the VM writes its RAM into while it boots: the RAM of a template in the making."""

    ram: Path


@dataclass(frozen=True, slots=True)
class TemplateMemory:
    """A template's RAM, mapped copy-on-write; the VM continues from the device state in `vmm`."""

    ram: Path
    vmm: Path


@dataclass(frozen=True, slots=True)
class SavedMemory:
    """Device state and RAM as `Vm.save` wrote them into `directory`; the VM continues from there, paused at first."""

    directory: Path


MemorySource = FreshMemory | SharedMemory | TemplateMemory | SavedMemory


@dataclass(frozen=True, slots=True)
class FreshDisk:
    """A new, empty data disk, deleted with the sandbox."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class SnapshotDisk:
    """A data disk copied from a snapshot of a volume, deleted with the sandbox."""

    snapshot: str


@dataclass(frozen=True, slots=True)
class VolumeDisk:
    """A volume as the data disk; it outlives the sandbox."""

    path: Path


DataDisk = FreshDisk | SnapshotDisk | VolumeDisk


@dataclass(frozen=True, slots=True)
class VmPlan:
    """What VM to make, and on which host resources.

    :param record: the sandbox whose policy governs the network; None for the VM of a template, whose network card leads
        nowhere.
    :param volumes: disk images of the volumes, in the order of the sandbox's specification.
    :param uid: user and group that the VMM runs as; None: the agent's own.
    :param save_root: parent of the directories that the VM may be saved into; None: the sandbox's state directory.
    """

    sandbox_id: str
    shape: Shape
    image: Image
    memory: MemorySource
    data_disk: DataDisk = FreshDisk(TEMPLATE_DISK_BYTES)
    volumes: tuple[Path, ...] = ()
    record: Record | None = None
    uid: int | None = None
    save_root: Path | None = None
    limits: RateLimits = field(default_factory=RateLimits)
    console_limit_bytes: int = _CONSOLE_LIMIT_BYTES


def sandbox_plan(host: HostServices, record: Record, image: Image, shape: Shape, memory: MemorySource) -> VmPlan:
    """Return the plan for the VM of a sandbox."""
    settings, spec = host.settings.sandbox, record.spec
    if not spec.root:
        data_disk: DataDisk = FreshDisk(spec.disk_bytes)
    elif is_snapshot(spec.root):
        data_disk = SnapshotDisk(spec.root)
    else:
        data_disk = VolumeDisk(host.volumes.disk(spec.root))
    return VmPlan(
        sandbox_id=record.id,
        shape=shape,
        image=image,
        memory=memory,
        data_disk=data_disk,
        volumes=tuple(host.volumes.disk(volume) for _, volume in spec.volumes),
        record=record,
        uid=record.uid,
        limits=RateLimits(settings.disk_bytes_per_s, settings.disk_operations_per_s, settings.net_bytes_per_s),
        console_limit_bytes=host.settings.vmm.console_limit_bytes,
    )


def vm_spec(plan: VmPlan, paths: Paths, cgroup: Path | None = None) -> VmSpec:
    """Return the driver's input for a plan; `cgroup` is the VMM's control group, made beforehand."""
    memory_file, restore_from = _memory(plan.memory)
    return VmSpec(
        id=plan.sandbox_id,
        vcpu_count=plan.shape.vcpu_count,
        memory_bytes=plan.shape.memory_bytes,
        kernel=plan.image.kernel.path,
        initramfs=plan.image.initramfs.path,
        cmdline=plan.shape.cmdline,
        disks=_disks(plan, paths),
        nic=NicSpec(TAP_NAME, GUEST_MAC),
        netns=plan.sandbox_id,
        run_dir=paths.sandbox_run(plan.sandbox_id),
        link=LinkKind(plan.shape.link),
        console_limit_bytes=plan.console_limit_bytes,
        memory_file=memory_file,
        restore_from=restore_from,
        start_paused=isinstance(plan.memory, SavedMemory),
        save_root=plan.save_root or paths.sandbox_state(plan.sandbox_id),
        uid=plan.uid,
        cgroup=cgroup,
        limits=plan.limits,
    )


def _memory(source: MemorySource) -> tuple[MemoryFile | None, Path | None]:
    """Return (memory_file, restore_from) of the driver's input."""
    match source:
        case FreshMemory():
            return None, None
        case SharedMemory(ram):
            return MemoryFile(ram, private=False), None
        case TemplateMemory(ram, vmm):
            return MemoryFile(ram, private=True), vmm
        case SavedMemory(directory):
            return None, directory


def _disks(plan: VmPlan, paths: Paths) -> tuple[DiskSpec, ...]:
    """Return image, data disk, and one disk for each volume slot: an empty one where there is no volume."""
    if isinstance(plan.data_disk, VolumeDisk):
        data = DiskSpec(plan.data_disk.path, DATA_DISK, read_only=False, durable=True)
    else:
        data = DiskSpec(paths.disk(plan.sandbox_id), DATA_DISK, read_only=False)
    empty = (paths.empty_slot(plan.sandbox_id, slot) for slot in range(len(plan.volumes), plan.shape.slots))
    slots = (*plan.volumes, *empty)
    return (
        DiskSpec(plan.image.root.path, "root", read_only=True),
        data,
        *(DiskSpec(path, volume_serial(slot), read_only=False, durable=True) for slot, path in enumerate(slots)),
    )
