"""From a plan to host resources and a driver's input: one test for each kind of VM, and what a failure leaves."""

from __future__ import annotations

import dataclasses
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from agent.common.errors import HostError, VmmError
from agent.common.model import State
from agent.common.telemetry import collect_phases
from agent.daemon.sandbox.machine import resources
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.vm_plan import (
    FreshDisk,
    FreshMemory,
    MemorySource,
    SavedMemory,
    SharedMemory,
    SnapshotDisk,
    TemplateMemory,
    VmPlan,
    VolumeDisk,
    sandbox_plan,
    vm_spec,
)
from agent.daemon.sandbox.machine.vm_shape import Shape, shape_of
from agent.daemon.vmm.driver import DiskSpec, MemoryFile, RateLimits
from tests.support import daemon_fakes as fakes
from tests.support.daemon_fakes import VMM, Bench, FakeImages, bench

IMAGE = FakeImages().get("minimal")
ID = "sbx-0000000000000000"
FILE, DIRECTORY = Path("/template/ram"), Path("/template/vmm")


def shape(host: HostServices, volumes: int = 0) -> Shape:
    return shape_of(host.settings, IMAGE, 1, 64 << 20, VMM, volumes)


def plan(node: Bench, memory: MemorySource, volumes: int = 0) -> VmPlan:
    record = fakes.record(id=ID, state=State.CREATING)
    return sandbox_plan(node.host, record, IMAGE, shape(node.host, volumes), memory)


@pytest.mark.parametrize(
    ("memory", "file", "restored", "paused"),
    [
        (FreshMemory(), None, None, False),
        (SharedMemory(FILE), MemoryFile(FILE, private=False), None, False),
        (TemplateMemory(FILE, DIRECTORY), MemoryFile(FILE, private=True), DIRECTORY, False),
        (SavedMemory(DIRECTORY), None, DIRECTORY, True),
    ],
)
async def test_the_memory_source_decides_how_a_vm_begins(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: MemorySource,
    file: MemoryFile | None,
    restored: Path | None,
    paused: bool,
) -> None:
    async with bench(tmp_path, monkeypatch) as node:
        spec = vm_spec(plan(node, memory), node.host.paths, Path("/cgroup"))
        assert (spec.memory_file, spec.restore_from, spec.start_paused) == (file, restored, paused)
        assert (spec.id, spec.netns, spec.cgroup) == (ID, ID, Path("/cgroup"))
        assert spec.save_root == node.host.paths.sandbox_state(ID)


async def test_data_disk_and_volumes_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(tmp_path, monkeypatch) as node:
        host, images = node.host, (DiskSpec(IMAGE.root.path, "root", read_only=True),)
        own = DiskSpec(host.paths.disk(ID), "data", read_only=False)

        def planned(**fields: object) -> VmPlan:
            record = fakes.record(id=ID, spec=fakes.spec(**fields))
            return sandbox_plan(host, record, IMAGE, shape(host, len(record.spec.volumes)), FreshMemory())

        fresh, copied, volume = planned(), planned(root="snp-a"), planned(root="vol-a")
        assert fresh.data_disk == FreshDisk(fakes.spec().disk_bytes)
        assert copied.data_disk == SnapshotDisk("snp-a")
        assert volume.data_disk == VolumeDisk(host.volumes.disk("vol-a"))
        assert vm_spec(fresh, host.paths).disks == (*images, own)
        assert vm_spec(copied, host.paths).disks == (*images, own)
        durable = DiskSpec(host.volumes.disk("vol-a"), "data", read_only=False, durable=True)
        assert vm_spec(volume, host.paths).disks == (*images, durable)

        one = planned(volumes=(("/mnt", "vol-b"),))
        slots = (host.volumes.disk("vol-b"), host.paths.empty_slot(ID, 1))
        expected = tuple(
            DiskSpec(path, f"volume{slot}", read_only=False, durable=True) for slot, path in enumerate(slots)
        )
        assert vm_spec(one, host.paths).disks == (*images, own, *expected)


async def test_rates_and_user_are_the_sandboxes_and_a_template_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, disk_bytes_per_s=1, disk_operations_per_s=2, net_bytes_per_s=3) as node:
        record = fakes.record(id=ID, uid=900_000)
        spec = vm_spec(sandbox_plan(node.host, record, IMAGE, shape(node.host), FreshMemory()), node.host.paths)
        assert (spec.limits, spec.uid) == (RateLimits(1, 2, 3), 900_000)
        template = VmPlan(ID, shape(node.host), IMAGE, SharedMemory(FILE), save_root=FILE.parent)
        spec = vm_spec(template, node.host.paths)
        assert (spec.limits, spec.save_root) == (RateLimits(), FILE.parent)


async def test_resources_are_made_in_order_and_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(tmp_path, monkeypatch) as node:
        with collect_phases() as phases:
            chosen = plan(node, FreshMemory(), volumes=1)
            async with resources.allocate(node.host, chosen) as allocated:
                await resources.create_disks(node.host, chosen)
                await resources.start_vm(node.host, chosen, allocated.cgroup, allocated.volatile)
                assert node.host.paths.disk(ID).exists()
                assert [node.host.paths.empty_slot(ID, slot).exists() for slot in range(3)] == [True, True, False]
                assert node.world.namespaces == {ID} == set(node.world.vms)
        assert [name for name, _ in phases] == ["directories", "cgroup", "netns", "disk", "vmm.start"]
        assert node.left() == []


async def test_the_vm_of_a_template_is_no_step_of_a_create(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(tmp_path, monkeypatch) as node:
        template = VmPlan(ID, shape(node.host), IMAGE, SharedMemory(FILE))
        with collect_phases() as phases:
            async with resources.allocate(node.host, template) as allocated:
                await resources.create_disks(node.host, template)
                await resources.start_vm(node.host, template, allocated.cgroup, allocated.volatile)
                assert node.world.namespaces == {ID}
        assert phases == []
        assert node.left() == []


async def test_kept_resources_outlive_their_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(tmp_path, monkeypatch) as node:
        async with resources.allocate(node.host, plan(node, FreshMemory())) as allocated:
            volatile, lasting = allocated.keep()
        state = str(node.host.paths.sandbox_state(ID))
        assert len(node.left()) == 3  # state, run, namespace
        await volatile.aclose()
        assert node.left() == [state]
        await lasting.aclose()
        assert node.left() == []


@pytest.mark.parametrize("phase", ["netns", "vmm.start"])
async def test_a_failed_restore_keeps_the_saved_state_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    async with bench(tmp_path, monkeypatch) as node:
        chosen = plan(node, SavedMemory(DIRECTORY))
        disk = node.host.paths.disk(ID)
        disk.parent.mkdir(parents=True)
        disk.write_bytes(b"kept")
        node.world.faults[phase] = (HostError if phase == "netns" else VmmError)("no")
        with pytest.raises((HostError, VmmError)):
            async with resources.allocate(node.host, chosen) as allocated:
                await resources.start_vm(node.host, chosen, allocated.cgroup, allocated.volatile)
        assert node.left() == [str(disk.parent)]
        assert disk.read_bytes() == b"kept"
        async with AsyncExitStack() as stack:
            resources.push_state_removal(node.host, ID, stack)


async def test_a_second_attempt_gets_a_new_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(tmp_path, monkeypatch) as node:
        chosen = plan(node, FreshMemory(), volumes=1)
        async with resources.allocate(node.host, chosen):
            await resources.create_disks(node.host, chosen)
            node.host.paths.disk(ID).write_bytes(b"of the first attempt")
            await resources.create_disks(node.host, dataclasses.replace(chosen, memory=FreshMemory()))
            assert node.host.paths.disk(ID).read_bytes() == b""
