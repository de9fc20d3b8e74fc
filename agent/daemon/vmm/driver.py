"""Driver interface: starts, adopts and controls the virtual machines of one VMM (QEMU, Cloud Hypervisor).

A driver knows the command line and control protocol of its VMM, and no policy: sizes, paths, namespaces and order come
from the caller as plain values, and a failed start leaves no process, socket or file behind.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from agent.daemon.host.process import ExitInfo


class LinkKind(StrEnum):
    """Transport of the byte stream between host and guest."""

    SERIAL = "serial"  # a virtio-serial port, a unix stream socket on the host
    VSOCK = "vsock"  # AF_VSOCK in the guest; on the host a unix socket with the CONNECT handshake, or AF_VSOCK


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """A raw disk image for the guest.

    :param serial: serial number by which the guest finds the disk (/sys/block/*/serial).
    :param durable: data that the guest has flushed must survive a power failure of the host.
    """

    path: Path
    serial: str
    read_only: bool
    durable: bool = False


@dataclass(frozen=True, slots=True)
class NicSpec:
    """The guest's network card, on an existing TAP inside the network namespace that the VMM is started in."""

    tap: str
    mac: str


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """A file, as large as the VM's memory, that holds its RAM.

    Shared, the VM writes into the file: so the RAM of a template is made. Private, the file is mapped copy-on-write:
    any number of clones start from one file, which must never change again.
    """

    path: Path
    private: bool


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Rate limits per second that the VMM enforces, separately for each direction; 0: no limit."""

    disk_bytes: int = 0
    disk_operations: int = 0
    net_bytes: int = 0


@dataclass(frozen=True, slots=True)
class VmSpec:
    """Input of `Driver.start`. Sizes are in bytes; paths exist, except for files that the VMM itself creates.

    :param netns: name of the network namespace under /run/netns; None: the agent's.
    :param run_dir: directory for sockets and logs, mode 0700; its path must be short enough for unix sockets.
    :param memory_file: None: anonymous memory, which `Vm.save` can write and `Vm.snapshot` cannot.
    :param restore_from: directory that `Vm.snapshot` or `Vm.save` filled; the VM continues from there instead of
        booting. All other fields must be as they were for that VM, but for `id`, `netns`, `run_dir`, `limits`, the
        paths of the writable disks (their sizes may differ: the driver tells the guest), and `memory_file`, which is
        private after `snapshot`, and None after `save`.
    :param start_paused: the CPUs wait for `Vm.resume`.
    :param save_root: parent of the directories for `Vm.save` and `Vm.snapshot`.
    :param uid: user and group that the VMM runs as, with a root view of its own files alone; None: the agent's user.
    :param cgroup: cgroup that the VMM and its helpers are moved to.
    """

    id: str
    vcpu_count: int
    memory_bytes: int
    kernel: Path
    initramfs: Path
    cmdline: str
    disks: tuple[DiskSpec, ...]
    nic: NicSpec | None
    netns: str | None
    run_dir: Path
    link: LinkKind
    console_limit_bytes: int = 1 << 20
    memory_file: MemoryFile | None = None
    restore_from: Path | None = None
    start_paused: bool = False
    save_root: Path | None = None
    uid: int | None = None
    limits: RateLimits = RateLimits()
    cgroup: Path | None = None


@dataclass(frozen=True, slots=True)
class VmmInfo:
    """Identity and abilities of the VMM in use.

    :param version: as the VMM reports it.
    :param accelerator: "kvm" or "tcg".
    :param reason: why VMM and accelerator were chosen.
    :param snapshot_key: one line that must be equal where a snapshot is made and where it is restored: VMM, version,
        and the features of the host's CPU that the guest sees.
    :param link: transport of the byte stream to the guests of this VMM.
    :param can_snapshot: its VMs can become templates.
    """

    name: str
    version: str
    accelerator: str
    reason: str
    snapshot_key: str = ""
    link: LinkKind = LinkKind.SERIAL
    can_snapshot: bool = True


class Vm(Protocol):
    """One running virtual machine."""

    @property
    def pid(self) -> int:
        """PID of the VMM process in the host's PID namespace."""

    @property
    def resume_token(self) -> Mapping[str, str]:
        """Facts (PID, start time, link) by which `Driver.adopt` finds this VM again."""

    async def dial(self) -> socket.socket:
        """Connect to the guest's end of the link; return a non-blocking stream socket, past any handshake.

        :raises GuestUnreachable: no process in the guest listens (yet).
        """

    async def wait(self) -> ExitInfo:
        """Wait for the end of the VMM process. Any number of tasks may wait; cancellation does not affect the VM."""

    async def stop(self) -> None:
        """Kill the VMM and its helpers (SIGKILL), wait for their end, and remove their sockets. Idempotent."""

    async def snapshot(self, directory: Path) -> None:
        """Pause the VM and write its state without the RAM into an empty directory. Only `stop` may follow.

        :raises VmmError: the write failed, or the VMM has no snapshots of such a VM (SNAPSHOT_UNSUPPORTED).
        """

    async def save(self, directory: Path) -> None:
        """Pause the VM and write its state and RAM into an empty directory. `resume` may follow, even after an error.

        :raises VmmError: the write failed, or the VMM cannot save such a VM (SNAPSHOT_UNSUPPORTED).
        """

    async def pause(self) -> None:
        """Stop the VM's CPUs. Idempotent.

        :raises VmmError: the VMM did not answer, or refused.
        """

    async def resume(self) -> None:
        """Start the VM's CPUs again. Idempotent.

        :raises VmmError: the VMM did not answer, or refused.
        """

    async def power_button(self) -> None:
        """Press the ACPI power button, on which a guest that handles it shuts down.

        :raises VmmError: the VMM did not answer, or refused.
        """

    def console_tail(self, limit_bytes: int) -> bytes:
        """Return the last output on the serial console, at most `limit_bytes`. Blocks."""


class Driver(Protocol):
    """Starts virtual machines of one VMM."""

    async def probe(self) -> VmmInfo:
        """Find the binary, and the accelerator that really boots a guest; cached after the first call.

        :raises VmmError: no usable VMM; the message says what to install.
        """

    async def start(self, spec: VmSpec) -> Vm:
        """Start a VM; return as soon as its control socket answers, while the guest may still be booting.

        :raises VmmError: the VMM did not start; no process, socket or file is left.
        """

    async def adopt(self, id: str, run_dir: Path, token: Mapping[str, str]) -> Vm | None:
        """Return the VM that an earlier agent started; None if it has ended.

        Identified by pidfd and start time, never by a PID alone.

        :param token: `Vm.resume_token` of that VM.
        """


@dataclass(frozen=True, slots=True)
class VmmOptions:
    """The operator's settings of a VMM.

    :param binary: path of the program; "": the driver finds it.
    :param accelerator: "auto", "kvm" or "tcg".
    :param link: "auto", "serial" or "vsock".
    :param note: appended to `VmmInfo.reason`.
    :param extra_args: appended to the command line.
    :param visible: additional files in the root view of a confined VMM.
    """

    binary: str = ""
    accelerator: str = "auto"
    link: str = "auto"
    note: str = ""
    extra_args: tuple[str, ...] = field(default=())
    visible: tuple[Path, ...] = ()
