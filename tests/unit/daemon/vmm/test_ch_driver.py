"""The Cloud Hypervisor driver with a script in the program's place."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.common.errors import VmmError
from agent.daemon.vmm.accelerator import AcceleratorProbe
from agent.daemon.vmm.cloud_hypervisor import cloud_hypervisor as drivers
from agent.daemon.vmm.cloud_hypervisor.cloud_hypervisor import CloudHypervisorDriver, trial
from agent.daemon.vmm.driver import LinkKind, MemoryFile, VmmOptions, VmSpec
from tests.support import fake_cloud_hypervisor

pytestmark = pytest.mark.timeout(30)
LOGS = {"vmm.log", "console.log"}


class Bench:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.requests = directory / "requests"
        self.snapshot = directory / "snapshot"
        self.snapshot.mkdir()
        self.binary = directory / "cloud-hypervisor"
        self.binary.write_text(f'#!/bin/sh\nexec {sys.executable} -I {fake_cloud_hypervisor.__file__} "$@"\n')
        self.binary.chmod(0o755)
        self.template = MemoryFile(directory / "mem0", private=False)
        self.clone: dict[str, Any] = {
            "memory_file": MemoryFile(directory / "mem0", private=True), "restore_from": self.snapshot,
        }  # fmt: skip

    def driver(self, accelerator: str = "kvm") -> CloudHypervisorDriver:
        probe = AcceleratorProbe(self.directory, None, None, trial)
        options = VmmOptions(binary=str(self.binary), accelerator=accelerator)
        return CloudHypervisorDriver(options, self.directory, probe, landlock=False)

    def spec(self, name: str = "one", **changes: Any) -> VmSpec:
        run_dir = self.directory / name
        run_dir.mkdir(mode=0o700)
        spec = VmSpec(
            id=name, vcpu_count=1, memory_bytes=64 << 20, kernel=Path("/k"), initramfs=Path("/i"), cmdline="quiet",
            disks=(), nic=None, netns=None, run_dir=run_dir, link=LinkKind.VSOCK,
        )  # fmt: skip
        return dataclasses.replace(spec, **changes)

    def asked(self) -> list[str]:
        return [line.split(" ")[0] for line in self.requests.read_text().splitlines()]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    # Any KVM will do: nothing opens it here.
    monkeypatch.setattr("agent.daemon.vmm.accelerator._KVM", "/dev/null")
    made = Bench(tmp_path)
    monkeypatch.setenv("FAKE_REQUESTS", str(made.requests))
    return made


async def test_a_life(bench: Bench) -> None:
    driver = bench.driver()
    spec = bench.spec(memory_file=bench.template)
    vm = await driver.start(spec)
    try:
        async with asyncio.timeout(5):
            while b"hello" not in vm.console_tail(100):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        await vm.pause()
        await vm.resume()
        await vm.snapshot(bench.snapshot)
        assert sorted(os.listdir(bench.snapshot)) == ["config.json", "state.json"]
        again = await driver.adopt("one", spec.run_dir, vm.resume_token)
        assert again is not None
        await again.resume()
        await again.power_button()
        assert (await vm.wait()).signal == signal.SIGKILL  # the guest resets: no second boot
        await again.stop()
    finally:
        await vm.stop()
    assert set(os.listdir(spec.run_dir)) <= LOGS
    assert bench.asked() == [
        "vmm.ping", "vm.create", "vm.boot", "vm.info", "vm.pause", "vm.info", "vm.resume", "vm.info", "vm.pause",
        "vm.snapshot", "vm.info", "vm.resume", "vm.power-button",
    ]  # fmt: skip


async def test_a_clone(bench: Bench) -> None:
    (bench.snapshot / "state.json").write_text("{}")
    vm = await bench.driver().start(bench.spec(**bench.clone))
    assert list(vm.events.recent) == ["vm restored", "vm resumed"]
    await vm.stop()
    assert bench.asked() == ["vmm.ping", "vm.restore"]
    body = json.loads(bench.requests.read_text().splitlines()[1].partition(" ")[2])
    assert body["source_url"] == f"file://{bench.directory}/one/restore"


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("exits", "exited with status 1 at once: no /dev/kvm here"),
        ("vm.create", "exited with status 1 at once: died of vm.create"),
        ("vm.boot", "exited with status 1 at once: died of vm.boot"),
        ("version", "drives v53 only"),
    ],
)
async def test_what_does_not_start_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, fault: str, text: str
) -> None:
    driver = bench.driver()
    await driver.probe()
    monkeypatch.setenv("FAKE_FAULT", fault)
    spec = bench.spec()
    with pytest.raises(VmmError, match=text):
        await driver.start(spec)
    assert set(os.listdir(spec.run_dir)) <= LOGS


async def test_a_clone_that_never_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drivers, "_RESUMED_TIMEOUT_S", 0.05)
    monkeypatch.setenv("FAKE_FAULT", "silent")
    (bench.snapshot / "state.json").write_text("{}")
    spec = bench.spec(**bench.clone)
    with pytest.raises(VmmError, match="did not report 'vm resumed'"):
        await bench.driver().start(spec)
    assert set(os.listdir(spec.run_dir)) <= LOGS


async def test_ram_in_a_snapshot(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULT", "ranges")
    vm = await bench.driver().start(bench.spec(memory_file=bench.template))
    with pytest.raises(VmmError, match="memory-ranges"):
        await vm.snapshot(bench.snapshot)
    await vm.stop()


async def test_a_vm_that_is_no_template(bench: Bench) -> None:
    vm = await bench.driver().start(bench.spec())
    with pytest.raises(VmmError) as caught:
        await vm.snapshot(bench.snapshot)
    assert caught.value.reason == "SNAPSHOT_UNSUPPORTED"
    await vm.stop()
    await vm.stop()


async def test_probe(bench: Bench) -> None:
    info = await bench.driver().probe()
    assert (info.name, info.version, info.accelerator) == ("cloud-hypervisor", "53.0", "kvm")
    for accelerator in ("tcg", "auto"):  # auto: there is no image to try
        with pytest.raises(VmmError, match="runs on KVM only") as caught:
            await bench.driver(accelerator).probe()
        assert caught.value.reason == "KVM_UNUSABLE"
