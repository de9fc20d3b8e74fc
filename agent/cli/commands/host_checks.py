"""What `doctor` can say of a host by a look at its kernel, its devices and its programs."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.cli import text
from agent.common.errors import AgentError
from agent.daemon.host import cgroup

if TYPE_CHECKING:
    from agent.common.config.settings import Settings

_SHOWN_USERS = 5
_SBIN = f"{os.defpath}:/usr/sbin:/sbin"


class Status(StrEnum):
    """ok: fine. warn: works without, or less well. missing: sandboxd does not run without it."""

    OK = "ok"
    WARN = "warn"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing of the host; `advice` says what to do about it."""

    name: str
    status: Status
    detail: str
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON."""
        return {"name": self.name, "status": self.status.value, "detail": self.detail, "advice": self.advice}


def nearest(path: Path) -> Path:
    """Returns the path itself, or the nearest directory above it that exists."""
    return next((place for place in (path, *path.parents) if place.exists()), Path("/"))


def host_checks(settings: Settings) -> list[Check]:
    """Returns the checks that need no more than a look, in the order of the report."""
    return [
        _kernel(), _cpus(), _memory(settings), _root(), _kvm(settings), _tun(), _nftables(), _uplink(settings),
        _pools(settings), *_vsock(settings), _ext4(),
        _builder("mkfs.erofs", "erofs-utils"), _builder("mmdebstrap", "mmdebstrap"), _cgroup(),
    ]  # fmt: skip


def _kernel() -> Check:
    machine, release = platform.machine(), platform.release()
    if platform.system() != "Linux":
        return Check("kernel", Status.MISSING, f"{platform.system()} {release}", "sandboxd needs Linux")
    if machine != "x86_64":
        return Check("kernel", Status.WARN, f"{release} on {machine}: guests are x86_64, so they are emulated")
    return Check("kernel", Status.OK, f"{release} on {machine}")


def _cpus() -> Check:
    count = len(os.sched_getaffinity(0))
    return Check("cpus", Status.OK, f"{count}")


def _memory(settings: Settings) -> Check:
    import psutil

    memory = psutil.virtual_memory()
    usable = memory.total - settings.node.reserved_memory_bytes
    detail = f"{text.size(memory.total)}, {text.size(memory.available)} available"
    if usable < settings.sandbox.default_memory_bytes:
        return Check(
            "memory", Status.WARN, f"{detail}: no sandbox of the default size fits",
            "lower sandbox.default_memory_bytes or node.reserved_memory_bytes",
        )  # fmt: skip
    return Check("memory", Status.OK, detail)


def _root() -> Check:
    if os.geteuid() == 0:
        return Check("root", Status.OK, "yes")
    return Check(
        "root",
        Status.WARN,
        "no: what follows is what this user may",
        "sandboxd makes namespaces and taps: run it as root",
    )


def _opens(device: str) -> str:
    """Returns "" if a device opens for reading and writing, else why not."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _kvm(settings: Settings) -> Check:
    why_not, wanted = _opens("/dev/kvm"), settings.vmm.accelerator
    if wanted == "tcg":
        return Check("kvm", Status.OK, "not used: vmm.accelerator is tcg")
    if not why_not:
        return Check("kvm", Status.OK, "/dev/kvm opens; whether a kernel boots on it, only a boot says (--probe)")
    detail = f"/dev/kvm does not open ({why_not})"
    if wanted == "kvm":
        return Check("kvm", Status.MISSING, f"{detail}, and vmm.accelerator is kvm", "set vmm.accelerator to auto")
    return Check(
        "kvm", Status.WARN, f"{detail}: guests are emulated (tcg), which is slower", "modprobe kvm, run as root"
    )


def _tun() -> Check:
    why_not = _opens("/dev/net/tun")
    if not why_not:
        return Check("tun", Status.OK, "/dev/net/tun opens")
    status = Status.MISSING if os.geteuid() == 0 else Status.WARN
    return Check("tun", status, f"/dev/net/tun does not open ({why_not})", "modprobe tun, run as root")


def _nftables() -> Check:
    """What sandboxes may reach is held by the kernel's packet filter, loaded through its library."""
    try:
        ctypes.CDLL("libnftables.so.1")
    except OSError:
        return Check(
            "nftables", Status.MISSING, "libnftables.so.1 is not found: sandboxes need it",
            "apt-get install libnftables1",
        )  # fmt: skip
    return Check("nftables", Status.OK, "libnftables.so.1 is there")


def _uplink(settings: Settings) -> Check:
    name = settings.egress.uplink
    if not name:
        return Check("uplink", Status.OK, "sandboxes leave through this host's own network")
    if Path("/run/netns", name).exists():
        return Check("uplink", Status.OK, f"sandboxes leave through the network namespace {name}")
    return Check("uplink", Status.MISSING, f"egress.uplink: there is no namespace {name}", f"ip netns add {name}")


def _pools(settings: Settings) -> Check:
    from agent.daemon.network.kernel import pool_users
    from agent.daemon.network.kernel.pool import Pool

    ranges = f"{settings.egress.pool_ipv4} and {settings.egress.pool_ipv6}"
    try:
        found = pool_users.find(settings.egress.uplink, Pool(settings.egress.pool_ipv4, settings.egress.pool_ipv6))
    except AgentError as error:
        return Check("address pools", Status.WARN, error.message, "run as root" if os.geteuid() else "")
    if found:
        detail = f"sandboxes get addresses of {ranges}, which others use: {', '.join(found[:_SHOWN_USERS])}"
        return Check("address pools", Status.WARN, detail, "set egress.pool_ipv4 and egress.pool_ipv6 to free ranges")
    return Check("address pools", Status.OK, f"nothing else uses {ranges}")


def _vsock(settings: Settings) -> list[Check]:
    """The vsock link needs the kernel's device or, without it, the program; the serial link neither."""
    from agent.daemon.vmm.qemu.vsock_backend import find_binary

    why_not = _opens("/dev/vhost-vsock")
    try:
        backend = find_binary(settings.paths.tools_dir)
    except AgentError:
        backend = ""
    # Cloud Hypervisor has a vsock device of its own.
    needed = settings.vmm.link == "vsock" and settings.vmm.driver != "cloud-hypervisor"
    lacking = Status.MISSING if needed and why_not and not backend else Status.WARN
    use = "" if needed else "; only QEMU with vmm.link vsock needs it"
    return [
        Check("vhost-vsock", Status.OK, "/dev/vhost-vsock opens") if not why_not
        else Check("vhost-vsock", lacking, f"/dev/vhost-vsock does not open ({why_not}){use}", "modprobe vhost_vsock"),
        Check("vhost-device-vsock", Status.OK, backend) if backend
        else Check(
            "vhost-device-vsock", lacking, f"neither in PATH nor in {settings.paths.tools_dir}{use}",
            "./bootstrap.sh setup",
        ),
    ]  # fmt: skip


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=_SBIN)


def _ext4() -> Check:
    found = _program("mkfs.ext4")
    if found is None:
        return Check("mkfs.ext4", Status.MISSING, "not found: disks are made with it", "apt-get install e2fsprogs")
    return Check("mkfs.ext4", Status.OK, found)


def _builder(name: str, package: str) -> Check:
    found = _program(name)
    if found is None:
        detail = "not found: only `sandboxctl image build` needs it"
        return Check(name, Status.WARN, detail, f"apt-get install {package}")
    return Check(name, Status.OK, found)


def _cgroup() -> Check:
    found = cgroup.available()
    missing = [name for name in cgroup.CONTROLLERS if name not in found]
    if not missing:
        return Check("cgroup v2", Status.OK, " ".join(found))
    detail = f"no controllers {' '.join(missing)}: sandboxes are not limited by the host"
    return Check("cgroup v2", Status.WARN, detail, "boot with systemd.unified_cgroup_hierarchy=1")
