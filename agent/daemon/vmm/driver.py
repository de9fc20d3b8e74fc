"""What a virtual machine monitor must offer: the interface that `sandbox/` drives, and every driver implements.

A driver knows one VMM (its argv, its control protocol). It decides nothing: sizes, paths, namespaces and order come
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
    """What carries the byte stream between host and guest."""

    SERIAL = "serial"  # a virtio-serial port, a unix stream socket on the host
    VSOCK = "vsock"  # AF_VSOCK in the guest; on the host a unix socket with the CONNECT handshake, or AF_VSOCK


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """A raw disk image for the guest; `serial` is how the guest finds it (/sys/block/*/serial).

    :param durable: what the guest flushes must outlive the host's power.
    """

    path: Path
    serial: str
    read_only: bool
    durable: bool = False


@dataclass(frozen=True, slots=True)
class NicSpec:
    """The guest's network card: a tap that exists already, inside the namespace that the VMM is started in."""

    tap: str
    mac: str


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """A file of the VM's memory size that is its RAM.

    Shared, the VM writes into it: that is how the RAM of a template is made. Private, it is mapped copy-on-write: any
    number of clones start from one file that must never change again.
    """

    path: Path
    private: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates that the VMM itself enforces, per second; 0: none. Each direction has its own."""

    disk_bytes: int = 0
    disk_operations: int = 0
    net_bytes: int = 0


@dataclass(frozen=True, slots=True)
class VmSpec:
    """Everything a driver needs to start one VM. Sizes are in bytes; paths exist, except what the VMM itself makes.

    With `restore_from`, a directory that `Vm.snapshot` or `Vm.save` filled, the VM goes on from there instead of
    booting: all else must be as it was for the VM of the snapshot, but `id`, `netns`, `run_dir`, `limits`, the paths of
    the writable disks (their size may differ: the driver tells the guest), and `memory_file`, which is now private for
    what `snapshot` wrote, and None for what `save` wrote. With `stands_still` its CPUs wait for `Vm.resume`.
    """

    id: str
    vcpu_count: int
    memory_bytes: int
    kernel: Path
    initramfs: Path
    cmdline: str
    disks: tuple[DiskSpec, ...]
    nic: NicSpec | None
    netns: str | None  # name under /run/netns
    run_dir: Path  # exists, mode 0700, short enough for unix sockets; the driver may fill it
    link: LinkKind
    console_limit_bytes: int = 1 << 20
    memory_file: MemoryFile | None = None  # None: memory of its own, which cannot be snapshotted
    restore_from: Path | None = None
    stands_still: bool = False
    save_root: Path | None = None  # below which directories for `Vm.save` and `Vm.snapshot` lie
    uid: int | None = None  # user and group that the VMM runs as, with a view of its own files alone; None: the agent's
    limits: Limits = Limits()
    cgroup: Path | None = None  # control group that the VMM and its helpers are moved to


@dataclass(frozen=True, slots=True)
class VmmInfo:
    """Which VMM this is: `version` as it reports it, `accelerator` "kvm" or "tcg", and why that was chosen.

    `snapshot_key` is one line that must be equal where a snapshot is made and where it is restored: VMM, version, and
    what of the host's CPU the guest sees. `link` is what carries the byte stream to the guests of this VMM;
    `can_snapshot` says whether they can be made templates.
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
        """Plain facts (pid, start time, socket paths) that `Driver.adopt` needs to find this VM again."""

    async def dial(self) -> socket.socket:
        """Returns a connected, non-blocking stream socket to the guest's link, past any handshake.

        :raises GuestUnreachable: nobody answers there.
        """

    async def wait(self) -> ExitInfo:
        """Returns once the VMM process is gone. Any number of tasks may wait; cancellation leaves the VM alone."""

    async def stop(self) -> None:
        """Ensures that the VMM and its helpers are gone (SIGKILL) and their sockets removed. Idempotent."""

    async def snapshot(self, directory: Path) -> None:
        """Pauses the VM and writes all but its RAM into `directory` (exists, empty). Only `stop` may follow.

        :raises VmmError: it failed; or the VM cannot be snapshotted (reason SNAPSHOT_UNSUPPORTED).
        """

    async def save(self, directory: Path) -> None:
        """Pauses the VM and writes all of it, its RAM as well, into `directory` (exists, empty). `resume` may follow.

        :raises VmmError: it failed, and `resume` lets the VM go on; or it cannot be saved (SNAPSHOT_UNSUPPORTED).
        """

    async def pause(self) -> None:
        """Stops the VM's CPUs. Idempotent. :raises VmmError:"""

    async def resume(self) -> None:
        """Lets the VM's CPUs go on. Idempotent. :raises VmmError:"""

    async def power_button(self) -> None:
        """Presses the power button: a guest that listens shuts down. :raises VmmError:"""

    def console_tail(self, limit_bytes: int) -> bytes:
        """Returns the last bytes that the guest wrote to its serial console, at most `limit_bytes`."""


class Driver(Protocol):
    """Starts virtual machines of one VMM."""

    async def probe(self) -> VmmInfo:
        """Finds the binary and the accelerator that really boots a guest; cached after the first call.

        :raises VmmError: no usable VMM; the message says what to install.
        """

    async def start(self, spec: VmSpec) -> Vm:
        """Starts the VM and returns as soon as its control socket answers; the guest may still be booting.

        :raises VmmError: the VMM did not start. Nothing is left behind.
        """

    async def adopt(self, id: str, run_dir: Path, token: Mapping[str, str]) -> Vm | None:
        """Returns the VM that an earlier agent started, or None if it does not live any more.

        Decides by pidfd, start time and socket, never by a PID alone.
        """


@dataclass(frozen=True, slots=True)
class VmmOptions:
    """What an operator may set about the VMM; empty means the driver finds it itself.

    `note` is added to the reason that the driver gives for its choice.
    """

    binary: str = ""
    accelerator: str = "auto"  # auto | kvm | tcg
    link: str = "auto"  # auto | serial | vsock
    note: str = ""
    extra_args: tuple[str, ...] = field(default=())
    visible: tuple[Path, ...] = ()  # what a confined VMM sees besides
