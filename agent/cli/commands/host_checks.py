"""Checks of `doctor` on this host's kernel, devices, network and programs."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.cli import formatting
from agent.common.errors import AgentError
from agent.daemon.host import cgroup

if TYPE_CHECKING:
    from agent.common.config.settings import Settings

_MAX_SHOWN_USERS = 5
_SBIN = f"{os.defpath}:/usr/sbin:/sbin"


class Status(StrEnum):
    """Result of a check: as it should be, optional or degraded, or required and missing."""

    OK = "ok"
    WARN = "warn"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Check:
    """Result for one resource of the host; `advice` says how to fix it."""

    name: str
    status: Status
    detail: str
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the form that `doctor --json` prints."""
        return {"name": self.name, "status": self.status.value, "detail": self.detail, "advice": self.advice}


def existing_ancestor(path: Path) -> Path:
    """Return `path` if it exists, else its closest ancestor that does."""
    return next((candidate for candidate in (path, *path.parents) if candidate.exists()), Path("/"))


def host_checks(settings: Settings) -> list[Check]:
    """Run the checks that only read state of this host, and return them in the order of the report."""
    return [
        _kernel(), _cpus(), _memory(settings), _root(), _kvm(settings), _tun(), _nftables(), _uplink(settings),
        _pools(settings), *_vsock(settings), _ext4(),
        _build_tool("mkfs.erofs", "erofs-utils"), _build_tool("mmdebstrap", "mmdebstrap"), _cgroup(),
    ]  # fmt: skip


def _kernel() -> Check:
    machine, release = platform.machine(), platform.release()
    if platform.system() != "Linux":
        return Check("kernel", Status.MISSING, f"{platform.system()} {release}", "sandboxd needs Linux")
    if machine != "x86_64":
        return Check("kernel", Status.WARN, f"{release} on {machine}: guests are x86_64 and must be emulated")
    return Check("kernel", Status.OK, f"{release} on {machine}")


def _cpus() -> Check:
    count = len(os.sched_getaffinity(0))
    return Check("cpus", Status.OK, f"{count}")


def _memory(settings: Settings) -> Check:
    import psutil

    memory = psutil.virtual_memory()
    usable = memory.total - settings.node.reserved_memory_bytes
    detail = f"{formatting.size(memory.total)}, {formatting.size(memory.available)} available"
    if usable < settings.sandbox.default_memory_bytes:
        return Check(
            "memory", Status.WARN, f"{detail}: too little for a sandbox of the default size",
            "lower sandbox.default_memory_bytes or node.reserved_memory_bytes",
        )  # fmt: skip
    return Check("memory", Status.OK, detail)


def _root() -> Check:
    if os.geteuid() == 0:
        return Check("root", Status.OK, "yes")
    return Check(
        "root",
        Status.WARN,
        "no: the checks below hold for this user",
        "run sandboxd as root: it creates namespaces and TAP devices",
    )


def _open_error(device: str) -> str:
    """Return the error of opening a device for reading and writing, or "" if it opens."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _kvm(settings: Settings) -> Check:
    error, wanted = _open_error("/dev/kvm"), settings.vmm.accelerator
    if wanted == "tcg":
        return Check("kvm", Status.OK, "not used: vmm.accelerator is tcg")
    if not error:
        return Check("kvm", Status.OK, "/dev/kvm opens; boot a kernel to test it (--probe)")
    detail = f"/dev/kvm does not open ({error})"
    if wanted == "kvm":
        return Check("kvm", Status.MISSING, f"{detail}, and vmm.accelerator is kvm", "set vmm.accelerator to auto")
    return Check(
        "kvm", Status.WARN, f"{detail}: guests are emulated (TCG), which is slower", "modprobe kvm, run as root"
    )


def _tun() -> Check:
    error = _open_error("/dev/net/tun")
    if not error:
        return Check("tun", Status.OK, "/dev/net/tun opens")
    status = Status.MISSING if os.geteuid() == 0 else Status.WARN
    return Check("tun", status, f"/dev/net/tun does not open ({error})", "modprobe tun, run as root")


def _nftables() -> Check:
    """Check for libnftables, through which the daemon loads the packet filter of every sandbox."""
    try:
        ctypes.CDLL("libnftables.so.1")
    except OSError:
        return Check(
            "nftables", Status.MISSING, "libnftables.so.1 is not installed; every sandbox needs it",
            "apt-get install libnftables1",
        )  # fmt: skip
    return Check("nftables", Status.OK, "libnftables.so.1 is installed")


def _uplink(settings: Settings) -> Check:
    name = settings.egress.uplink
    if not name:
        return Check("uplink", Status.OK, "sandboxes use the network of this host")
    if Path("/run/netns", name).exists():
        return Check("uplink", Status.OK, f"sandboxes use the network namespace {name}")
    return Check(
        "uplink", Status.MISSING, f"egress.uplink: the network namespace {name} does not exist", f"ip netns add {name}"
    )


def _pools(settings: Settings) -> Check:
    from agent.daemon.network.kernel import pool_users
    from agent.daemon.network.kernel.pool import AddressPool

    ranges = f"{settings.egress.pool_ipv4} and {settings.egress.pool_ipv6}"
    try:
        found = pool_users.find(
            settings.egress.uplink, AddressPool(settings.egress.pool_ipv4, settings.egress.pool_ipv6)
        )
    except AgentError as error:
        return Check("address pools", Status.WARN, error.message, "run as root" if os.geteuid() else "")
    if found:
        detail = (
            f"other programs use addresses of {ranges}, the sandboxes' pools: {', '.join(found[:_MAX_SHOWN_USERS])}"
        )
        return Check("address pools", Status.WARN, detail, "set egress.pool_ipv4 and egress.pool_ipv6 to free ranges")
    return Check("address pools", Status.OK, f"no other program uses {ranges}")


def _vsock(settings: Settings) -> list[Check]:
    """Check for /dev/vhost-vsock and vhost-device-vsock: QEMU with the vsock link needs one of them."""
    from agent.daemon.vmm.qemu.vsock_backend import find_binary

    error = _open_error("/dev/vhost-vsock")
    try:
        backend = find_binary(settings.paths.tools_dir)
    except AgentError:
        backend = ""
    # Cloud Hypervisor implements vsock itself.
    needed = settings.vmm.link == "vsock" and settings.vmm.driver != "cloud-hypervisor"
    status = Status.MISSING if needed and error and not backend else Status.WARN
    use = "" if needed else "; only QEMU with vmm.link = vsock needs it"
    return [
        Check("vhost-vsock", Status.OK, "/dev/vhost-vsock opens") if not error
        else Check("vhost-vsock", status, f"/dev/vhost-vsock does not open ({error}){use}", "modprobe vhost_vsock"),
        Check("vhost-device-vsock", Status.OK, backend) if backend
        else Check(
            "vhost-device-vsock", status, f"neither in PATH nor in {settings.paths.tools_dir}{use}",
            "./bootstrap.sh setup",
        ),
    ]  # fmt: skip


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=_SBIN)


def _ext4() -> Check:
    found = _program("mkfs.ext4")
    if found is None:
        return Check("mkfs.ext4", Status.MISSING, "not found: required to create disks", "apt-get install e2fsprogs")
    return Check("mkfs.ext4", Status.OK, found)


def _build_tool(name: str, package: str) -> Check:
    found = _program(name)
    if found is None:
        detail = "not found; only `sandboxctl image build` needs it"
        return Check(name, Status.WARN, detail, f"apt-get install {package}")
    return Check(name, Status.OK, found)


def _cgroup() -> Check:
    found = cgroup.available()
    missing = [name for name in cgroup.CONTROLLERS if name not in found]
    if not missing:
        return Check("cgroup v2", Status.OK, " ".join(found))
    detail = f"missing controllers: {' '.join(missing)}; the host does not limit the resources of sandboxes"
    return Check("cgroup v2", Status.WARN, detail, "boot with systemd.unified_cgroup_hierarchy=1")
