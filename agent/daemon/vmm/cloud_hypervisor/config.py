"""From a VM's specification to Cloud Hypervisor's VmConfig (vmm/src/vm_config.rs at v53.0): pure, tested word by word.

The same specification gives the same configuration for `vm.create` and for the config.json of a clone, so that device
ids, counts and sizes match what state.json holds; only paths, sharing of the RAM and rates may differ. Fields that are
left out have the defaults of v53.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agent.common.errors import InvalidSpec, VmmError
from agent.daemon.vmm.cloud_hypervisor.layout import Layout
from agent.daemon.vmm.driver import DiskSpec, Limits, LinkKind, NicSpec, VmSpec

GUEST_CID = 3  # of every VM: each has a vsock of its own, and a clone's driver has cached it
NET_ID = "net0"
# The limiter cools down for 100 ms (docs/io_throttling.md); a bucket of one second's tokens is refilled within it.
_REFILL_MS = 1000
_TAP_QUEUES = 2  # one pair


def check(spec: VmSpec) -> None:
    """:raises VmmError: Cloud Hypervisor cannot give what the specification asks for."""
    if spec.link is not LinkKind.VSOCK:
        raise VmmError("Cloud Hypervisor has no virtio-serial ports: set vmm.link to vsock", reason="LINK_UNSUPPORTED")
    private = spec.memory_file is not None and spec.memory_file.private
    if private and spec.restore_from is None:
        raise InvalidSpec("a VM has a private memory file only if it is restored from a snapshot")
    if spec.memory_file is not None and not private and spec.restore_from is not None:
        raise InvalidSpec("a VM that is restored has a private memory file, or none")


def is_template(spec: VmSpec) -> bool:
    """Returns whether the VM can be snapshotted: its RAM is a file that it writes into."""
    return spec.memory_file is not None and not spec.memory_file.private


def vm_config(spec: VmSpec, *, landlock: bool, zone: bool = False) -> dict[str, Any]:
    """Returns the VmConfig for `vm.create`, without the network card (see `net`).

    :param zone: its RAM is a zone although it is no file, as that of a VM that was cloned and then saved.
    """
    layout = Layout(spec.run_dir)
    config: dict[str, Any] = {
        "cpus": {"boot_vcpus": spec.vcpu_count, "max_vcpus": spec.vcpu_count, "nested": False},
        "memory": memory(spec, zone=zone),
        "payload": {"kernel": str(spec.kernel), "initramfs": str(spec.initramfs), "cmdline": spec.cmdline},
        "disks": [disk(entry, spec.limits) for entry in spec.disks],
        "rng": {"src": "/dev/urandom"},
        "vsock": {"id": "vsock0", "cid": GUEST_CID, "socket": str(layout.vsock)},
        # Its stdout, a pipe that never blocks. A file would grow for ever, and a socket is dead for good once its
        # reader dies with data unread (ECONNRESET ends the thread that accepts; vmm/src/serial_manager.rs).
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
        # Where RAM is a file, freed pages would be punched out of it: a clone's is read-only, a template's is shared.
        config["balloon"] = {"id": "balloon0", "size": 0, "deflate_on_oom": True, "free_page_reporting": True}
    return config


def restore_config(spec: VmSpec, *, landlock: bool, zone: bool = False) -> dict[str, Any]:
    """Returns the config.json to restore with."""
    config = vm_config(spec, landlock=landlock, zone=zone)
    if spec.nic is not None:
        # Its length is how many descriptors are to come; the numbers are ignored.
        config["net"] = [net(spec.nic, spec.limits) | {"fds": [-1]}]
    return config


def memory(spec: VmSpec, *, zone: bool = False) -> dict[str, Any]:
    """Returns the MemoryConfig. RAM in a file needs a zone of its own, and `size` is then 0."""
    file = spec.memory_file
    if file is None and not zone:
        return {"size": spec.memory_bytes}
    only: dict[str, Any] = {"id": "mem0", "size": spec.memory_bytes, "shared": False}
    if file is not None:
        only |= {"file": str(file.path), "shared": not file.private}
    return {"size": 0, "thp": False, "zones": [only]}


def has_zone(snapshot: Path) -> bool:
    """Whether the RAM of a saved VM is a zone. :raises VmmError: its configuration cannot be read."""
    try:
        return bool(json.loads((snapshot / "config.json").read_text())["memory"].get("zones"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VmmError(f"the snapshot cannot be read: {error}", reason="SNAPSHOT_FAILED") from error


def disk_id(serial: str) -> str:
    """Returns the device id of the disk with this serial number."""
    return f"disk-{serial}"


def disk(entry: DiskSpec, limits: Limits) -> dict[str, Any]:
    """Returns a DiskConfig. A detected type would protect sector 0, so it is stated."""
    config: dict[str, Any] = {
        "id": disk_id(entry.serial),
        "path": str(entry.path),
        "serial": entry.serial,
        "readonly": entry.read_only,
        "image_type": "Raw",
    }
    buckets = {"bandwidth": limits.disk_bytes, "ops": limits.disk_operations}
    return config | _limiter(buckets)


def net(nic: NicSpec, limits: Limits) -> dict[str, Any]:
    """Returns a NetConfig for a tap that is passed as a descriptor: so the VMM needs no capability to open it."""
    config: dict[str, Any] = {"id": NET_ID, "mac": nic.mac, "num_queues": _TAP_QUEUES}
    return config | _limiter({"bandwidth": limits.net_bytes})


def _limiter(rates: dict[str, int]) -> dict[str, Any]:
    buckets = {name: {"size": rate, "refill_time": _REFILL_MS} for name, rate in rates.items() if rate}
    return {"rate_limiter_config": buckets} if buckets else {}
