"""The Cloud Hypervisor driver with the real program and a guest without an operating system."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import re
import signal
import time
from pathlib import Path

import pytest

from agent.common.errors import VmmError
from agent.daemon.network.kernel import namespaces
from agent.daemon.vmm import accelerator
from agent.daemon.vmm.accelerator import AcceleratorProbe
from agent.daemon.vmm.cloud_hypervisor.cloud_hypervisor import CloudHypervisorDriver, trial
from agent.daemon.vmm.cloud_hypervisor.vm import CloudHypervisorVm
from agent.daemon.vmm.driver import DiskSpec, LinkKind, NicSpec, VmmOptions
from agent.daemon.vmm.host_features import landlock_works
from tests.support import no_nested_state
from tests.support.bare_guest import FILLED_PAGES, BareGuest
from tests.support.cloud_hypervisor_bench import (  # fmt: skip
    BINARY,
    DEADLINE_S,
    MIB,
    Bench,
    counter,
    counts,
    greets,
    running,
    until,
    why_not,
)

USER = 64123  # has no name, no group and no file on this host

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


@pytest.fixture
def bench(directory: Path) -> Bench:
    return Bench(directory)


def status(pid: int, thread: int | None = None) -> dict[str, str]:
    path = Path(f"/proc/{pid}/status" if thread is None else f"/proc/{pid}/task/{thread}/status")
    return dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)


def check_confinement(pid: int, uid: int = 0) -> None:
    """No capability, no way to one, and seccomp in every thread but the first, which only waits for the others."""
    assert status(pid)["Uid"].split() == [str(uid)] * 4
    threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    for thread in threads:
        facts = status(pid, thread)
        assert facts["NoNewPrivs"] == "1"
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(facts[name], 16) == 0, name
        if thread != pid and not facts["Name"].startswith("kvm-"):
            assert facts["Seccomp"] == "2", facts["Name"]
    assert len(threads) >= 5


async def test_one_vm(bench: Bench) -> None:
    disk = bench.sized("disk", MIB)
    async with namespaces.namespace("sbx-ch-one") as namespace:
        nic = NicSpec("tap0", "02:00:00:00:00:01")
        spec = bench.spec("one", netns=namespace, nic=nic, disks=(DiskSpec(disk, "disk0", read_only=False),))
        async with running(bench.driver(), spec) as vm:
            await greets(vm)
            await counts(vm.pid)
            check_confinement(vm.pid)
            assert os.readlink(f"/proc/{vm.pid}/ns/net") != os.readlink("/proc/self/ns/net")

            await vm.pause()
            await vm.pause()
            stands = counter(vm.pid)
            await asyncio.sleep(0.1)
            assert counter(vm.pid) == stands
            await vm.resume()
            await vm.resume()
            assert await counts(vm.pid) > stands

            counted = await vm.counters()
            assert counted["net0"]["rx_frames"] >= 0
            assert counted["disk-disk0"]["read_bytes"] == 0
            os.truncate(disk, 2 * MIB)
            await vm.announce_disk_size("disk0", 2 * MIB)
            with pytest.raises(VmmError, match="none"):
                await vm.announce_disk_size("none", MIB)
            await vm.power_button()  # the guest does not listen
            with pytest.raises(VmmError) as caught:
                await vm.snapshot(bench.directory)
            assert caught.value.reason == "SNAPSHOT_UNSUPPORTED"
            assert (spec.run_dir / "vmm" / "vsock.sock").is_socket()
            with pytest.raises(TimeoutError):  # a connection waits for the guest's driver
                async with asyncio.timeout(0.1):
                    await vm.dial()
            waiting = asyncio.create_task(vm.wait())
        assert (await waiting).signal == signal.SIGKILL
        await vm.stop()


async def test_clones_share_what_they_do_not_write(bench: Bench) -> None:
    driver = bench.driver(shim=True)
    async with namespaces.namespace("sbx-ch-tpl") as first, namespaces.namespace("sbx-ch-two") as second:
        nic = NicSpec("tap0", "02:00:00:00:00:01")
        template = bench.template(netns=first, nic=nic)
        snapshot = bench.directory / "snapshot"
        snapshot.mkdir()
        async with running(driver, template) as vm:
            await greets(vm)
            await counts(vm.pid)
            await vm.snapshot(snapshot)
            frozen = counter(vm.pid)
        assert sorted(os.listdir(snapshot)) == ["config.json", "state.json"]
        digest = hashlib.sha256(bench.memory.read_bytes()).digest()

        specs = (bench.clone(template, "one", snapshot), bench.clone(template, "two", snapshot, netns=second))
        one, two = await asyncio.gather(*(driver.start(spec) for spec in specs))
        try:
            # Each goes on from the template, by itself.
            await one.pause()
            stands = counter(one.pid)
            assert stands >= frozen
            await counts(two.pid)
            assert await counts(two.pid) != stands
            assert counter(one.pid) == stands
            filled_kib = FILLED_PAGES * 4
            for vm in (one, two):
                facts = smaps(vm.pid)
                assert facts["Rss"] >= filled_kib
                assert facts["Shared_Clean"] + facts["Shared_Dirty"] >= filled_kib
                assert 0 < facts["Anonymous"] < filled_kib  # only what was written
                check_confinement(vm.pid)
                assert (await vm.counters()).keys() == {"net0"}
        finally:
            await one.stop()
            await two.stop()
        assert hashlib.sha256(bench.memory.read_bytes()).digest() == digest


def smaps(pid: int) -> dict[str, int]:
    """What proc_pid_smaps(5) says of the RAM, in KiB."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    section = text[text.index("/mem0\n") :].partition("VmFlags:")[0]
    return {name: int(value) for name, value in re.findall(r"^(\w+): +(\d+) kB$", section, re.MULTILINE)}


async def test_another_agent_goes_on(bench: Bench) -> None:
    spec = bench.spec("one", BareGuest(chatters=True))
    async with running(bench.driver(), spec) as vm:
        await greets(vm)
        token = dict(vm.resume_token)
        for wrong in ({}, {"pid": "x"}, token | {"start_time": "1"}):
            assert await bench.driver().adopt("one", spec.run_dir, wrong) is None
        for pipe in (vm._console.pipe, vm._log.pipe, vm.events.pipe):
            pipe.close()  # as if this agent had died, with data unread
        await counts(vm.pid)
        (spec.run_dir / "console.log").unlink()
        again = await bench.driver().adopt("one", spec.run_dir, token)
        assert again is not None
        assert (again.pid, dict(again.resume_token)) == (vm.pid, token)
        await again.pause()
        assert await vm.api.state() == "Paused"
        await again.resume()
        await counts(vm.pid)
        await until(lambda: b"....\n" in again.console_tail(100))
        await again.stop()
        assert (await again.wait()).describe() == "ended"
    assert await bench.driver().adopt("one", spec.run_dir, token) is None


async def test_a_guest_that_resets_ends_its_vmm(bench: Bench) -> None:
    async with running(bench.driver(), bench.spec("one", BareGuest(resets=True))) as vm, asyncio.timeout(DEADLINE_S):
        await vm.wait()
        assert "vm rebooting" in vm.events.recent


async def test_the_console_is_bounded(bench: Bench) -> None:
    spec = bench.spec("one", BareGuest(chatters=True), console_limit_bytes=512)
    async with running(bench.driver(), spec) as vm:
        await until((spec.run_dir / "console.log.1").exists)
        assert sum(path.stat().st_size for path in spec.run_dir.glob("console.log*")) <= 512
        assert vm.console_tail(16).count(b".") >= 15


async def test_landlock_keeps_it_out_of_other_directories(bench: Bench) -> None:
    if not landlock_works():
        pytest.skip("this kernel has no Landlock")
    elsewhere = bench.directory / "elsewhere"
    elsewhere.mkdir()
    async with running(bench.driver(shim=True), bench.template()) as vm:
        await vm.pause()
        with pytest.raises(VmmError, match="Permission denied"):
            await vm.api.snapshot(elsewhere)


async def test_a_snapshot_that_the_vmm_refuses_says_why(bench: Bench) -> None:
    if not no_nested_state.is_needed():
        pytest.skip("this KVM has nested state, and snapshots work")
    async with running(bench.driver(), bench.template()) as vm:
        with pytest.raises(VmmError, match=r"refused vm\.snapshot .*vCPU state") as caught:
            await vm.snapshot(bench.directory)
        assert caught.value.reason == "SNAPSHOT_FAILED"


async def test_as_another_user(bench: Bench) -> None:
    """On this host /dev/kvm may be root's alone: the VMM has a node of its own."""
    driver = bench.driver(shim=True)
    snapshot = bench.directory / "snapshot"
    snapshot.mkdir(mode=0o700)
    async with namespaces.namespace("sbx-ch-user") as namespace:
        template = bench.template(netns=namespace, nic=NicSpec("tap0", "02:00:00:00:00:01"))
        disk = bench.sized("disk", MIB)
        disk.chmod(0o600)
        template = dataclasses.replace(template, disks=(DiskSpec(disk, "disk0", read_only=False),), uid=USER)
        bench.memory.chmod(0o600)
        async with running(driver, template) as vm:
            await greets(vm)
            assert (bench.memory.stat().st_uid, disk.stat().st_uid) == (USER, USER)
            await counts(vm.pid)
            check_confinement(vm.pid, USER)
            await vm.snapshot(snapshot)
        assert bench.memory.stat().st_uid == 0  # clones could write to what is theirs
        bench.memory.chmod(0o444)
        assert (snapshot / "state.json").stat().st_uid == 0
        async with running(driver, bench.clone(template, "one", snapshot)) as vm:
            await counts(vm.pid)
            check_confinement(vm.pid, USER)
            assert not (bench.directory / "one" / "restore").exists()


async def test_what_cannot_start_leaves_nothing(bench: Bench) -> None:
    driver = bench.driver()
    no_kernel = dataclasses.replace(bench.spec("a"), kernel=bench.directory / "none")
    no_tap = bench.spec("b", nic=NicSpec("sbxnone", "02:00:00:00:00:01"), netns="sbx-none")
    no_snapshot = bench.clone(bench.template("c"), "d", bench.directory / "none")
    serial = bench.spec("e", link=LinkKind.SERIAL)
    broken = bench.directory / "broken"
    broken.mkdir()
    (broken / "state.json").write_text("{}")
    bad_snapshot = bench.clone(no_snapshot, "f", broken)
    for spec, text in (
        (no_kernel, "refused vm.boot"), (no_tap, "sbx-none"), (no_snapshot, "cannot be read"), (serial, "vmm.link"),
        (bad_snapshot, "refused vm.restore"),
    ):  # fmt: skip
        with pytest.raises(VmmError, match=text):
            await driver.start(spec)
        assert set(os.listdir(spec.run_dir)) <= {"vmm.log", "console.log"}


async def test_a_cancelled_start_leaves_nothing(bench: Bench) -> None:
    driver = bench.driver()
    await driver.probe()
    for number, delay in enumerate((0.0, 0.005, 0.015, 0.03)):
        spec = bench.spec(f"vm{number}")
        task = asyncio.create_task(driver.start(spec))
        await asyncio.sleep(delay)
        task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(result, CloudHypervisorVm):
            await result.stop()
        assert set(os.listdir(spec.run_dir)) <= {"vmm.log", "console.log"}


async def test_a_vmm_that_refuses_its_arguments(bench: Bench) -> None:
    probe = AcceleratorProbe(bench.directory, None, None, trial)
    options = VmmOptions(binary=BINARY, accelerator="kvm", extra_args=("--no-such-option",))
    with pytest.raises(VmmError, match=r"exited with status 2 at once: .*no-such-option") as caught:
        await CloudHypervisorDriver(options, bench.directory, probe).start(bench.spec("one"))
    assert caught.value.reason == "VMM_NOT_STARTED"


async def test_the_probe_wants_a_kernel_that_reaches_its_first_program(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "_DEADLINE_S", 0.5)
    kernel = bench.file("bare.elf", BareGuest().elf())
    probe = AcceleratorProbe(bench.directory / "cache", kernel, bench.initramfs, trial)
    driver = CloudHypervisorDriver(VmmOptions(binary=BINARY), bench.directory, probe)
    with pytest.raises(VmmError, match="does not reach its first program") as caught:
        await driver.probe()
    assert caught.value.reason == "KVM_UNUSABLE"
    started = time.monotonic()
    with pytest.raises(VmmError, match="does not reach its first program"):
        await driver.probe()
    assert time.monotonic() - started < 0.4  # it is remembered
    info = await bench.driver().probe()
    assert re.fullmatch(r"cloud-hypervisor 53\.\d+ kvm [0-9a-f]{16}", info.snapshot_key)
