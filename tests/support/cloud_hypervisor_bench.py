"""What tests of the Cloud Hypervisor driver share: the real program, and guests without an operating system.

The program is that of SANDBOXD_TEST_CLOUD_HYPERVISOR, or `cloud-hypervisor` in PATH.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import struct
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from agent.daemon.vmm.accelerator import AcceleratorProbe
from agent.daemon.vmm.cloud_hypervisor.cloud_hypervisor import CloudHypervisorDriver, trial
from agent.daemon.vmm.cloud_hypervisor.vm import CloudHypervisorVm
from agent.daemon.vmm.driver import LinkKind, MemoryFile, VmmOptions, VmSpec
from tests.support import no_nested_state
from tests.support.bare_guest import COUNTER_ADDRESS, GREETING, BareGuest

MIB = 1 << 20
BINARY = os.environ.get("SANDBOXD_TEST_CLOUD_HYPERVISOR") or shutil.which("cloud-hypervisor") or ""
DEADLINE_S = 15.0


def why_not() -> str | None:
    """Returns why it cannot be used here, if it cannot."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "needs a /dev/kvm that opens"
    if not BINARY or not Path(BINARY).exists():
        return "needs cloud-hypervisor v53 in PATH or SANDBOXD_TEST_CLOUD_HYPERVISOR"
    return None


class Bench:
    """Files for VMs below one directory, and drivers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.chmod(0o711)
        self.memory = directory / "mem0"
        self.initramfs = self.file("initramfs", b"none")

    def file(self, name: str, data: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(data)
        path.chmod(0o644)
        return path

    def sized(self, name: str, size: int) -> Path:
        path = self.file(name, b"")
        os.truncate(path, size)
        return path

    def driver(self, *, shim: bool = False) -> CloudHypervisorDriver:
        """Returns a driver; with `shim` its VMM can snapshot even where KVM has no nested state."""
        binary = BINARY
        if shim and no_nested_state.is_needed():
            program = self.file("no_nested_state.py", Path(no_nested_state.__file__).read_bytes())
            python = os.path.realpath(sys.executable)
            script = self.file("cloud-hypervisor", f'#!/bin/sh\nexec {python} {program} {BINARY} "$@"\n'.encode())
            script.chmod(0o755)
            binary = str(script)
        probe = AcceleratorProbe(self.directory, None, None, trial)
        options = VmmOptions(binary=binary, accelerator="kvm", visible=(self.directory, Path(BINARY)))
        return CloudHypervisorDriver(options, self.directory, probe)

    def spec(self, name: str, guest: BareGuest | None = None, **changes: object) -> VmSpec:
        run_dir = self.directory / name
        run_dir.mkdir(mode=0o700)
        kernel = self.file(f"{name}.elf", (guest or BareGuest()).elf())
        spec = VmSpec(
            id=name, vcpu_count=1, memory_bytes=64 * MIB, kernel=kernel, initramfs=self.initramfs, cmdline="quiet",
            disks=(), nic=None, netns=None, run_dir=run_dir, link=LinkKind.VSOCK,
        )  # fmt: skip
        return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]

    def template(self, name: str = "tpl", guest: BareGuest | None = None, **changes: object) -> VmSpec:
        self.sized("mem0", 64 * MIB)
        return self.spec(name, guest, memory_file=MemoryFile(self.memory, private=False), **changes)

    def clone(self, template: VmSpec, name: str, snapshot: Path, **changes: object) -> VmSpec:
        run_dir = self.directory / name
        run_dir.mkdir(mode=0o700)
        private = MemoryFile(self.memory, private=True)
        changes |= {"id": name, "run_dir": run_dir, "memory_file": private, "restore_from": snapshot}
        return dataclasses.replace(template, **changes)  # type: ignore[arg-type]


@asynccontextmanager
async def running(driver: CloudHypervisorDriver, spec: VmSpec) -> AsyncIterator[CloudHypervisorVm]:
    vm = await driver.start(spec)
    try:
        yield vm
    finally:
        await vm.stop()
        assert not set(os.listdir(spec.run_dir)) - {"vmm.log", "vmm.log.1", "console.log", "console.log.1"}


def ram_address(pid: int) -> int:
    """Where the RAM is mapped in the VMM: a file called mem0, or the largest mapping that can be written."""
    best = (0, 0)
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        start, end = (int(word, 16) for word in line.split()[0].split("-"))
        if line.endswith("/mem0"):
            return start
        if " rw-p " in line:
            best = max(best, (end - start, start))
    return best[1]


def counter(pid: int) -> int:
    """How far the guest has counted."""
    with open(f"/proc/{pid}/mem", "rb") as memory:
        memory.seek(ram_address(pid) + COUNTER_ADDRESS)
        (value,) = struct.unpack("<I", memory.read(4))
    return int(value)


async def until(condition: Callable[[], bool]) -> None:
    """Returns once `condition` holds; nothing in a VMM tells when it does."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def counts(pid: int) -> int:
    """Returns the counter once it has grown."""
    before = counter(pid)
    await until(lambda: counter(pid) != before)
    return counter(pid)


async def greets(vm: CloudHypervisorVm) -> None:
    await until(lambda: GREETING in vm.console_tail(1 << 20))
