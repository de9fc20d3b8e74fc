"""Shape of a VM: the properties that all clones of one template share, and how its RAM size is derived. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from agent.common.config.settings import Settings
from agent.daemon.storage.disks import MIN_DISK_BYTES
from agent.daemon.storage.images import Image
from agent.daemon.vmm.driver import LinkKind, VmmInfo

DATA_DISK = "data"  # serial number of the writable disk
TEMPLATE_DISK_BYTES = MIN_DISK_BYTES  # data disk of a template's VM; clones have data disks of their own size
SLOT_BYTES = 1 << 20  # disk that fills a volume slot without a volume
_SLOTS = (0, 2, 8)  # few numbers, so that there are few templates
# RAM that a Linux 6.12 guest keeps for itself: RAM less MemTotal, measured from 128 MiB to 16 GiB, is 38 MiB and 1.6 %.
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


def ram_bytes(requested_bytes: int) -> int:
    """Return the RAM size of a VM whose guest sees `requested_bytes` as MemTotal, or up to 4 % more.

    Sizes are rounded up to one of 32 per power of two, so that there are few templates.
    """
    needed = requested_bytes + _KERNEL_SHARE_BYTES + requested_bytes * _KERNEL_SHARE_PER_MILLE // 1000
    step = max(_MIB, (1 << (needed.bit_length() - 1)) // _STEPS_PER_OCTAVE)
    return -(-needed // step) * step


def volume_serial(slot: int) -> str:
    """Return the disk serial number by which the guest finds the volume in a slot."""
    return f"volume{slot}"


@dataclass(frozen=True, slots=True)
class Shape:
    """Properties that a template and its clones have in common.

    :param memory_bytes: RAM of the VM, more than the guest's MemTotal.
    :param snapshot_key: `VmmInfo.snapshot_key` of the VMM that boots the template.
    :param slots: number of disks for volumes.
    """

    image_digest: str
    vcpu_count: int
    memory_bytes: int
    cmdline: str
    snapshot_key: str
    link: str = LinkKind.SERIAL.value
    slots: int = 0

    @property
    def digest(self) -> str:
        """16 hex digits; the name of the template."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def shape_of(
    settings: Settings, image: Image, vcpu_count: int, memory_bytes: int, vmm: VmmInfo, volumes: int = 0
) -> Shape:
    """Return the shape of a sandbox's VM.

    :param memory_bytes: MemTotal that the sandbox requests.
    :param volumes: number of volumes to attach, at most 8.
    """
    arguments = f"sandboxd.root={image.root_format} sandboxd.link={vmm.link} {settings.vmm.extra_kernel_args}"
    return Shape(
        image_digest=image.digest,
        vcpu_count=vcpu_count,
        memory_bytes=ram_bytes(memory_bytes),
        cmdline=f"{_KERNEL_ARGS} {arguments}".strip(),
        snapshot_key=vmm.snapshot_key,
        link=vmm.link.value,
        slots=next(slots for slots in _SLOTS if volumes <= slots),
    )
