"""Cloud Hypervisor's VmConfig (vmm/src/vm_config.rs at v53.0) for a `VmSpec`: pure, every field tested.

The same spec gives the same configuration for `vm.create` and for the config.json of a clone, so that device ids,
counts and sizes match state.json; only paths, sharing of the RAM and rate limits may differ. Omitted fields have the
defaults of v53.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agent.common.errors import InvalidSpec, VmmError
from agent.daemon.vmm.cloud_hypervisor.layout import Layout
from agent.daemon.vmm.driver import DiskSpec, LinkKind, NicSpec, RateLimits, VmSpec

GUEST_CID = 3  # the same for every VM: each has a vsock of its own, and the driver in a clone has cached the CID
NET_ID = "net0"
# A bucket holds one second's tokens; an exhausted limiter is checked again after 100 ms (docs/io_throttling.md).
_REFILL_MS = 1000
_TAP_QUEUES = 2  # one pair


def check(spec: VmSpec) -> None:
    """Check that Cloud Hypervisor can run the VM.

    :raises VmmError: the link is not vsock (LINK_UNSUPPORTED).
    :raises InvalidSpec: memory file and snapshot do not fit together.
    """
    if spec.link is not LinkKind.VSOCK:
        raise VmmError("Cloud Hypervisor has no virtio-serial ports: set vmm.link to vsock", reason="LINK_UNSUPPORTED")
    private = spec.memory_file is not None and spec.memory_file.private
    if private and spec.restore_from is None:
        raise InvalidSpec("a private memory file needs a snapshot to restore")
    if spec.memory_file is not None and not private and spec.restore_from is not None:
        raise InvalidSpec("a restored VM needs a private memory file, or none")


def is_template(spec: VmSpec) -> bool:
    """Return whether the VM will become a template: its RAM is a file that it writes into."""
    return spec.memory_file is not None and not spec.memory_file.private


def vm_config(spec: VmSpec, *, landlock: bool, zone: bool = False) -> dict[str, Any]:
    """Return the VmConfig for `vm.create`, without the network card (see `net`).

    :param landlock: the VMM confines itself by Landlock.
    :param zone: the RAM is a memory zone although it is no file: in a clone that was saved.
    """
    layout = Layout(spec.run_dir)
    config: dict[str, Any] = {
        "cpus": {"boot_vcpus": spec.vcpu_count, "max_vcpus": spec.vcpu_count, "nested": False},
        "memory": memory(spec, zone=zone),
        "payload": {"kernel": str(spec.kernel), "initramfs": str(spec.initramfs), "cmdline": spec.cmdline},
        "disks": [disk(entry, spec.limits) for entry in spec.disks],
        "rng": {"src": "/dev/urandom"},
        "vsock": {"id": "vsock0", "cid": GUEST_CID, "socket": str(layout.vsock)},
        # Tty is the VMM's stdout: a pipe that never blocks. A file would grow without bound, and a socket stops working
        # once its reader dies with unread data (ECONNRESET ends the accepting thread; vmm/src/serial_manager.rs).
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
        "landlock_enable": landlock,
    }
    if landlock:
        # The VMM derives the rules for all other paths.
        written = layout.snapshot if is_template(spec) else spec.save_root
        rules = [{"path": str(written), "access": "rw"}] if written is not None else []
        if spec.restore_from is not None and spec.memory_file is None:
            rules.append({"path": str(spec.restore_from), "access": "r"})
        config["landlock_rules"] = rules
    if spec.memory_file is None and not zone:
        # Only for anonymous RAM. In a file, freed pages would be punched out: a clone's file is read-only, a template's
        # is shared.
        config["balloon"] = {"id": "balloon0", "size": 0, "deflate_on_oom": True, "free_page_reporting": True}
    return config


def restore_config(spec: VmSpec, *, landlock: bool, zone: bool = False) -> dict[str, Any]:
    """Return the config.json for `vm.restore`."""
    config = vm_config(spec, landlock=landlock, zone=zone)
    if spec.nic is not None:
        # The length of `fds` is the number of descriptors to come; the values are ignored.
        config["net"] = [net(spec.nic, spec.limits) | {"fds": [-1]}]
    return config


def memory(spec: VmSpec, *, zone: bool = False) -> dict[str, Any]:
    """Return the MemoryConfig. RAM in a file needs a memory zone, and `size` is then 0."""
    file = spec.memory_file
    if file is None and not zone:
        return {"size": spec.memory_bytes}
    only: dict[str, Any] = {"id": "mem0", "size": spec.memory_bytes, "shared": False}
    if file is not None:
        only |= {"file": str(file.path), "shared": not file.private}
    return {"size": 0, "thp": False, "zones": [only]}


def has_zone(snapshot: Path) -> bool:
    """Return whether the RAM of a saved VM is a memory zone.

    :raises VmmError: the saved configuration cannot be read (SNAPSHOT_FAILED).
    """
    try:
        return bool(json.loads((snapshot / "config.json").read_text())["memory"].get("zones"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VmmError(f"the snapshot cannot be read: {error}", reason="SNAPSHOT_FAILED") from error


def disk_id(serial: str) -> str:
    """Return the device id of the disk with this serial number."""
    return f"disk-{serial}"


def disk(entry: DiskSpec, limits: RateLimits) -> dict[str, Any]:
    """Return a DiskConfig. The image type is stated, since autodetection would write-protect sector 0."""
    config: dict[str, Any] = {
        "id": disk_id(entry.serial),
        "path": str(entry.path),
        "serial": entry.serial,
        "readonly": entry.read_only,
        "image_type": "Raw",
    }
    buckets = {"bandwidth": limits.disk_bytes, "ops": limits.disk_operations}
    return config | _limiter(buckets)


def net(nic: NicSpec, limits: RateLimits) -> dict[str, Any]:
    """Return a NetConfig for a TAP that is passed as a descriptor, so that the VMM needs no capability to open it."""
    config: dict[str, Any] = {"id": NET_ID, "mac": nic.mac, "num_queues": _TAP_QUEUES}
    return config | _limiter({"bandwidth": limits.net_bytes})


def _limiter(rates: dict[str, int]) -> dict[str, Any]:
    buckets = {name: {"size": rate, "refill_time": _REFILL_MS} for name, rate in rates.items() if rate}
    return {"rate_limiter_config": buckets} if buckets else {}
