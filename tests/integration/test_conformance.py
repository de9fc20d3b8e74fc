"""What every VMM driver must do alike.

QEMU runs the real Linux guest. Cloud Hypervisor runs it where its probe says that it boots, and everywhere else a guest
without an operating system, which is enough for all but what only Linux can do.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest

from agent.common.config.paths import Paths
from agent.common.config.settings import Settings
from agent.common.errors import NotFound, VmmError
from agent.common.model import SandboxSpec, State
from agent.daemon.guestlink.channel import Channel
from agent.daemon.network.kernel import namespaces
from agent.daemon.sandbox.machine import guest_setup
from agent.daemon.sandbox.machine.vm_plan import FreshMemory, VmPlan, vm_spec
from agent.daemon.sandbox.machine.vm_shape import TEMPLATE_DISK_BYTES, shape_of
from agent.daemon.sandbox.state.record import Record
from agent.daemon.storage.disks import DiskMaker
from agent.daemon.storage.images import ImageStore
from agent.daemon.vmm.accelerator import AcceleratorProbe, qemu_trial
from agent.daemon.vmm.cloud_hypervisor.cloud_hypervisor import CloudHypervisorDriver, trial
from agent.daemon.vmm.driver import Driver, MemoryFile, Vm, VmmOptions, VmSpec
from agent.daemon.vmm.qemu.qemu import QemuDriver
from guest.wire import Frame
from tests.conftest import IMAGES_DIR
from tests.support import cloud_hypervisor_bench as bare
from tests.support.bare_guest import GREETING
from tests.support.client import MIB

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120)]
LOGS = {"vmm.log", "vmm.log.1", "console.log", "console.log.1"}
BOOT_TIMEOUT_S = 60.0
STANDS_S = 0.5
ENDS_S = 10.0
NAMESPACE = "sbx-conform"
# It says that it is a VMM that its driver knows, and never runs one.
GIVES_UP = """#!/bin/sh
case "$*" in *-version) echo "QEMU emulator version 10.0.2, cloud-hypervisor v53.0"; exit;; esac
echo "no luck" >&2
exit 3
"""


class Rig(Protocol):
    """A driver, and a guest that can tell whether it runs and what it has in memory."""

    driver: Driver

    def driver_of(self, binary: Path) -> Driver:
        """Returns a driver of the same kind with another program."""

    def spec(self, name: str) -> VmSpec:
        """Returns a VM with memory of its own; its run directory is there."""

    async def up(self, vm: Vm) -> bytes:
        """Returns once the guest runs: something that is on its console then."""

    async def turns(self, vm: Vm) -> None:
        """Returns once the guest has done something since the call."""

    async def differ(self, one: Vm, two: Vm) -> None:
        """Makes each of two clones write, and checks that neither has what the other wrote."""


class Linux:
    """A driver and the guest of the image `minimal`.

    :param verdicts: where it is kept what boots here, for all tests of a run.
    """

    def __init__(self, directory: Path, name: str, verdicts: Path) -> None:
        self._directory = directory
        self._image = ImageStore(IMAGES_DIR).get("minimal")
        self._files = (verdicts, self._image.kernel.path, self._image.initramfs.path)
        self._is_qemu = name == "qemu"
        self.driver = self.driver_of(None if self._is_qemu else Path(bare.BINARY))

    def driver_of(self, binary: Path | None) -> Driver:
        options = VmmOptions(binary="" if binary is None else str(binary))
        if self._is_qemu:
            return QemuDriver(options, self._directory, AcceleratorProbe(*self._files, qemu_trial))
        return CloudHypervisorDriver(options, self._directory, AcceleratorProbe(*self._files, trial))

    async def open(self) -> None:
        self._shape = shape_of(Settings(), self._image, 1, 128 * MIB, await self.driver.probe())

    def spec(self, name: str) -> VmSpec:
        run_dir = self._directory / name
        run_dir.mkdir(mode=0o700)
        spec = vm_spec(VmPlan(name, self._shape, self._image, FreshMemory()), Paths(self._directory, self._directory))
        return dataclasses.replace(spec, netns=None, nic=None, disks=spec.disks[:1], run_dir=run_dir)

    @asynccontextmanager
    async def sandbox_spec(self) -> AsyncIterator[VmSpec]:
        """A VM with the disk and the card of a sandbox."""
        paths = Paths(self._directory, self._directory)
        disk = paths.disk("one")
        disk.parent.mkdir(parents=True)
        await DiskMaker(self._directory / "disks").make_disk(disk, TEMPLATE_DISK_BYTES)
        run_dir = self._directory / "one"
        run_dir.mkdir(mode=0o700)
        async with namespaces.namespace(NAMESPACE) as namespace:
            spec = vm_spec(VmPlan("one", self._shape, self._image, FreshMemory()), paths)
            yield dataclasses.replace(spec, netns=namespace, run_dir=run_dir)

    @asynccontextmanager
    async def channel(self, vm: Vm, *, fresh: bool = False) -> AsyncIterator[Channel]:
        channel = await guest_setup.connect(vm, fresh=fresh, timeout_s=BOOT_TIMEOUT_S)
        try:
            yield channel
        finally:
            await channel.aclose()

    async def up(self, vm: Vm) -> bytes:
        async with self.channel(vm, fresh=True) as channel:
            assert (await channel.call("sys.hello"))["pid"] == 1
        return b"sandboxd-init: serving"

    async def turns(self, vm: Vm) -> None:
        async with self.channel(vm) as channel:
            await channel.call("sys.hello")

    async def differ(self, one: Vm, two: Vm) -> None:
        async with self.channel(one) as first, self.channel(two) as second:
            mine: dict[str, Any] = {"new_path": "/run/mine", "user": "root"}
            await first.call("fs.symlink", target="one", **mine)
            with pytest.raises(NotFound):
                await second.call("fs.readlink", path="/run/mine", user="root")
            await second.call("fs.symlink", target="two", **mine)
            for channel, word in ((first, "one"), (second, "two")):
                assert await channel.call("fs.readlink", path="/run/mine", user="root") == {"target": word}


class Bare:
    """Cloud Hypervisor and a guest that counts in memory."""

    def __init__(self, directory: Path) -> None:
        self._bench = bare.Bench(directory)
        self.driver: Driver = self._bench.driver(shim=True)

    def driver_of(self, binary: Path) -> Driver:
        probe = AcceleratorProbe(self._bench.directory, None, None, trial)
        options = VmmOptions(binary=str(binary), accelerator="kvm")
        return CloudHypervisorDriver(options, self._bench.directory, probe)

    def spec(self, name: str) -> VmSpec:
        return self._bench.spec(name)

    async def up(self, vm: Vm) -> bytes:
        await bare.until(lambda: GREETING in vm.console_tail(1 << 20))
        return GREETING

    async def turns(self, vm: Vm) -> None:
        await bare.counts(vm.pid)

    async def differ(self, one: Vm, two: Vm) -> None:
        await one.pause()
        stands = bare.counter(one.pid)
        await bare.counts(two.pid)
        assert await bare.counts(two.pid) != stands
        assert bare.counter(one.pid) == stands
        await one.resume()


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verdicts")


async def linux_with(name: str, directory: Path, verdicts: Path) -> Linux:
    """Returns a driver with a Linux guest; skips the test, with the driver's reason, where it boots none."""
    if name != "qemu" and (reason := bare.why_not()) is not None:
        pytest.skip(reason)
    found = Linux(directory, name, verdicts)
    try:
        await found.open()
    except VmmError as error:
        if name == "qemu":
            raise
        pytest.skip(error.message)
    return found


@pytest.fixture(params=["qemu", "cloud-hypervisor"])
async def linux(request: pytest.FixtureRequest, directory: Path, verdicts: Path) -> Linux:
    return await linux_with(request.param, directory, verdicts)


@pytest.fixture(params=["qemu", "cloud-hypervisor", "cloud-hypervisor-bare"])
async def rig(request: pytest.FixtureRequest, directory: Path, verdicts: Path) -> Rig:
    if request.param != "cloud-hypervisor-bare":
        return await linux_with(request.param, directory, verdicts)
    if (reason := bare.why_not()) is not None:
        pytest.skip(reason)
    return Bare(directory)


def left(spec: VmSpec) -> set[str]:
    """What is in the run directory besides logs."""
    return set(os.listdir(spec.run_dir)) - LOGS


@asynccontextmanager
async def running(rig: Rig, spec: VmSpec) -> AsyncIterator[Vm]:
    """A VM whose guest runs, and of which nothing is left."""
    vm = await rig.driver.start(spec)
    try:
        if spec.restore_from is None:
            await rig.up(vm)
        yield vm
    finally:
        await vm.stop()
        assert not left(spec)
        assert vm.pid not in psutil.pids()


async def test_a_guest_becomes_a_sandbox(linux: Linux) -> None:
    async with linux.sandbox_spec() as spec, running(linux, spec) as vm:
        asked = SandboxSpec("minimal", 1, 128 * MIB, TEMPLATE_DISK_BYTES, env={"GREETING": "hello"})
        async with linux.channel(vm) as channel:
            emulated = (await linux.driver.probe()).accelerator == "tcg"
            await guest_setup.prepare(channel, emulated=emulated)
            await guest_setup.configure(channel, Record("sbx-one", asked, State.CREATING, 0.0), BOOT_TIMEOUT_S)
            assert (await channel.call("sys.hello"))["configured"] is True
            assert await shell(channel, 'echo "$GREETING $(hostname)"; exit 7') == (b"hello sbx-one\n", 7)


async def test_a_guest_that_is_told_to_ends_in_order(linux: Linux) -> None:
    async with running(linux, linux.spec("one")) as vm:
        async with linux.channel(vm) as channel:
            await channel.call("sys.poweroff")
        async with asyncio.timeout(ENDS_S):
            ended = await vm.wait()
        assert ended.exit_code == 0


async def shell(channel: Channel, script: str) -> tuple[bytes, int]:
    """Returns what a program printed, and its exit code."""
    said = b""
    async with channel.stream("proc.exec", argv=["/bin/sh", "-c", script], stdin="null") as stream:
        while (frame := await stream.recv()) is not None and frame[0] is not Frame.RESULT:
            said += frame[1] if frame[0] is Frame.STDOUT else b""
        assert frame is not None
        return said, frame[1]["exit"]["code"]


async def test_it_pauses_and_goes_on(rig: Rig) -> None:
    async with running(rig, rig.spec("one")) as vm:
        await rig.turns(vm)
        await vm.pause()
        await vm.pause()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(STANDS_S):
                await rig.turns(vm)
        await vm.resume()
        await vm.resume()
        await rig.turns(vm)
        await vm.power_button()


async def test_its_end_is_told_to_all_who_wait(rig: Rig) -> None:
    spec = rig.spec("one")
    vm = await rig.driver.start(spec)
    waiting = [asyncio.create_task(vm.wait()) for _ in range(2)]
    said = await rig.up(vm)
    gives_up = asyncio.create_task(vm.wait())
    await asyncio.sleep(0)
    gives_up.cancel()
    os.kill(vm.pid, signal.SIGKILL)
    async with asyncio.timeout(2):
        for task in waiting:
            assert (await task).signal == signal.SIGKILL
    await vm.stop()
    await vm.stop()
    assert said in vm.console_tail(1 << 20)
    assert len(vm.console_tail(5)) == 5
    assert not left(spec)


async def test_another_agent_finds_it_and_no_other(rig: Rig) -> None:
    spec = rig.spec("one")
    async with running(rig, spec) as vm:
        token = dict(vm.resume_token)
        for wrong in ({}, {"pid": "x"}, token | {"start_time": "1"}, token | {"pid": str(os.getpid())}):
            assert await rig.driver.adopt("one", spec.run_dir, wrong) is None
        again = await rig.driver.adopt("one", spec.run_dir, token)
        assert again is not None
        assert (again.pid, dict(again.resume_token)) == (vm.pid, token)
        await rig.turns(again)
        await again.stop()
        assert (await again.wait()).describe() in ("ended", "killed by signal 9")
    assert await rig.driver.adopt("one", spec.run_dir, token) is None


async def test_clones_go_their_own_ways(rig: Rig, directory: Path) -> None:
    one = await clone_of(rig, rig.spec("template"), directory)
    two = dataclasses.replace(one, id="two", run_dir=rig.spec("two").run_dir)
    ram = directory / "mem0"
    before = hashlib.sha256(ram.read_bytes()).digest()
    async with running(rig, one) as first, running(rig, two) as second:
        await rig.differ(first, second)
    assert hashlib.sha256(ram.read_bytes()).digest() == before


@pytest.mark.parametrize("cloned", [False, True])
async def test_it_goes_on_from_all_that_was_saved(rig: Rig, directory: Path, cloned: bool) -> None:
    saved = directory / "saved"
    saved.mkdir(mode=0o700)
    spec = dataclasses.replace(rig.spec("source"), save_root=directory)
    if cloned:
        spec = await clone_of(rig, spec, directory)
    async with running(rig, spec) as vm:
        await rig.turns(vm)
        await vm.save(saved)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(STANDS_S):
                await rig.turns(vm)
        await vm.resume()
        await rig.turns(vm)
    elsewhere: dict[str, Any] = {"memory_file": None, "restore_from": saved, "start_paused": True}
    one, two = (
        dataclasses.replace(spec, id=name, run_dir=rig.spec(name).run_dir, **elsewhere) for name in ("one", "two")
    )
    async with running(rig, one) as first, running(rig, two) as second:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(STANDS_S):
                await rig.turns(first)
        for vm in (first, second):
            await vm.resume()
            await rig.turns(vm)
        await rig.differ(first, second)


async def clone_of(rig: Rig, spec: VmSpec, directory: Path) -> VmSpec:
    """Makes a template of a VM and returns a clone of it."""
    ram, snapshot = directory / "mem0", directory / "snapshot"
    snapshot.mkdir()
    with ram.open("wb") as file:
        os.ftruncate(file.fileno(), spec.memory_bytes)
    template = dataclasses.replace(spec, memory_file=MemoryFile(ram, private=False))
    async with running(rig, template) as vm:
        await rig.turns(vm)
        await vm.snapshot(snapshot)
    return dataclasses.replace(
        spec, id="clone", run_dir=rig.spec("clone").run_dir, memory_file=MemoryFile(ram, private=True),
        restore_from=snapshot,
    )  # fmt: skip


async def test_what_cannot_start_leaves_nothing(rig: Rig, directory: Path) -> None:
    broken = directory / "broken"
    broken.mkdir()
    ram = directory / "mem0"
    ram.touch()
    faults: tuple[dict[str, Any], ...] = (
        {"kernel": directory / "none"},
        {"netns": "sbx-none"},
        {"restore_from": broken, "memory_file": MemoryFile(ram, private=True)},
    )
    for number, fault in enumerate(faults):
        spec = dataclasses.replace(rig.spec(f"vm{number}"), **fault)
        with pytest.raises(VmmError):
            await rig.driver.start(spec)
        assert not left(spec)


async def test_a_program_that_gives_up_leaves_nothing_but_its_words(rig: Rig, directory: Path) -> None:
    program = directory / "gives-up"
    program.write_text(GIVES_UP)
    program.chmod(0o755)
    spec = rig.spec("one")
    with pytest.raises(VmmError, match="exited with status 3 at once: no luck") as caught:
        await rig.driver_of(program).start(dataclasses.replace(spec, netns=None))
    assert caught.value.reason == "VMM_NOT_STARTED"
    assert not left(spec)


async def test_a_cancelled_start_leaves_nothing(rig: Rig) -> None:
    await rig.driver.probe()
    for number, delay in enumerate((0.0, 0.005, 0.02, 0.05)):
        spec = rig.spec(f"vm{number}")
        task = asyncio.create_task(rig.driver.start(spec))
        await asyncio.sleep(delay)
        task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        if not isinstance(result, BaseException):
            await result.stop()
        assert not left(spec)
