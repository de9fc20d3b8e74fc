"""The VM that a sandbox gets: its sizes, its devices, its kernel's command line. Pure; all else is in the driver."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from agent.common.config.paths import Paths
from agent.common.config.settings import Settings
from agent.common.model import GUEST_MAC, SandboxSpec
from agent.daemon.network.kernel import namespaces
from agent.daemon.storage.images import Image
from agent.daemon.storage.volumes import Volumes, is_snapshot
from agent.daemon.vmm.driver import DiskSpec, Limits, LinkKind, MemoryFile, NicSpec, VmmInfo, VmSpec

DATA_DISK = "data"
# Of a template's disk; clones have disks of their own.
TEMPLATE_DISK_BYTES = 16 << 20
SLOT_BYTES = 1 << 20  # of a place for a volume that is empty
_SLOTS = (0, 2, 8)  # few numbers, so that there are few templates
# What a Linux 6.12 guest keeps of its RAM: measured as RAM less MemTotal from 128 MiB to 16 GiB, it is 38 MiB and 1.6
# %.
_KERNEL_SHARE_BYTES = 40 << 20
_KERNEL_SHARE_PER_MILLE = 17
_MIB = 1 << 20
_STEPS_PER_OCTAVE = 32
_KERNEL_ARGS = (
    "console=ttyS0 quiet loglevel=4 panic=-1 no_timer_check tsc=reliable random.trust_cpu=on 8250.nr_uarts=1 "
    # The crypto self-tests and synchronous RCU are the two largest waits of a boot without hardware help.
    "rcupdate.rcu_expedited=1 cryptomgr.notests "
    # No device here needs bounce buffers, for which a guest of over 2 GiB would set 64 MiB aside.
    "swiotlb=noforce"
)


def ram_bytes(asked_bytes: int) -> int:
    """Returns how much RAM a VM gets for its guest to see `asked_bytes` as MemTotal, or up to 4 % more.

    Sizes are rounded up to one of 32 per power of two, so that there are few templates.
    """
    needed = asked_bytes + _KERNEL_SHARE_BYTES + asked_bytes * _KERNEL_SHARE_PER_MILLE // 1000
    step = max(_MIB, (1 << (needed.bit_length() - 1)) // _STEPS_PER_OCTAVE)
    return -(-needed // step) * step


@dataclass(frozen=True, slots=True)
class Disks:
    """Disks of a sandbox that outlive it.

    :param root: the writable disk; None: a fresh one of its own.
    :param volumes: in the order of the specification's.
    """

    root: Path | None = None
    volumes: tuple[Path, ...] = ()


_NO_VOLUMES = Disks()


def disks_of(volumes: Volumes, spec: SandboxSpec) -> Disks:
    """Returns the disks of a sandbox that outlive it."""
    root = volumes.disk(spec.root) if spec.root and not is_snapshot(spec.root) else None
    return Disks(root, tuple(volumes.disk(volume) for _, volume in spec.volumes))


def volume_serial(number: int) -> str:
    """Returns how the guest finds a volume."""
    return f"volume{number}"


@dataclass(frozen=True, slots=True)
class Shape:
    """What the clones of one template have in common."""

    image_digest: str
    vcpu_count: int
    memory_bytes: int  # RAM of the VM
    cmdline: str
    snapshot_key: str
    link: str = LinkKind.SERIAL.value
    slots: int = 0  # disks for volumes

    @property
    def digest(self) -> str:
        """16 hex digits; the name of the template."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def shape_of(
    settings: Settings, image: Image, vcpu_count: int, memory_bytes: int, vmm: VmmInfo, volumes: int = 0
) -> Shape:
    """Returns the shape of a sandbox that asks for so many CPUs, bytes and volumes."""
    arguments = f"sandboxd.root={image.root_format} sandboxd.link={vmm.link} {settings.vmm.extra_kernel_args}"
    cmdline = f"{_KERNEL_ARGS} {arguments}".strip()
    return Shape(
        image.digest,
        vcpu_count,
        ram_bytes(memory_bytes),
        cmdline,
        vmm.snapshot_key,
        vmm.link.value,
        next(slots for slots in _SLOTS if volumes <= slots),
    )


def vm_spec(
    settings: Settings, paths: Paths, sandbox_id: str, shape: Shape, image: Image,
    memory_file: MemoryFile | None = None, restore_from: Path | None = None, disks: Disks = _NO_VOLUMES,
    uid: int | None = None, cgroup: Path | None = None,
) -> VmSpec:  # fmt: skip
    """Returns the VM of a sandbox, or of a template in the making."""
    slots = [
        disks.volumes[n] if n < len(disks.volumes) else paths.empty_slot(sandbox_id, n) for n in range(shape.slots)
    ]
    sandbox, vmm = settings.sandbox, settings.vmm
    return VmSpec(
        id=sandbox_id,
        vcpu_count=shape.vcpu_count,
        memory_bytes=shape.memory_bytes,
        kernel=image.kernel.path,
        initramfs=image.initramfs.path,
        cmdline=shape.cmdline,
        disks=(
            DiskSpec(image.root.path, "root", read_only=True),
            DiskSpec(disks.root or paths.disk(sandbox_id), DATA_DISK, read_only=False, durable=disks.root is not None),
            *(DiskSpec(path, volume_serial(n), read_only=False, durable=True) for n, path in enumerate(slots)),
        ),
        nic=NicSpec(namespaces.TAP, GUEST_MAC),
        netns=sandbox_id,
        run_dir=paths.sandbox_run(sandbox_id),
        link=LinkKind(shape.link),
        console_limit_bytes=vmm.console_limit_bytes,
        memory_file=memory_file,
        restore_from=restore_from,
        save_root=paths.sandbox_state(sandbox_id),
        uid=uid,
        cgroup=cgroup,
        limits=Limits(sandbox.disk_bytes_per_s, sandbox.disk_operations_per_s, sandbox.net_bytes_per_s),
    )
