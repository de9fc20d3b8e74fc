"""Control groups, made for real where this host has cgroup v2; what they limit is tested inside a VM."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.common.errors import HostError, VmmError
from agent.daemon.host import cgroup
from agent.daemon.host import process as host_process
from agent.daemon.host.cgroup import CgroupLimits, Cgroups

LIMITS = CgroupLimits(cpus=1.5, weight=100, memory_bytes=1 << 30, tasks=64)
NAME = "sbx-unittest"


@pytest.fixture
def groups() -> Iterator[Cgroups]:
    made = Cgroups.open(f"/sandboxd-test-{os.getpid()}")
    if made.directory is None:
        pytest.skip(f"no cgroup can be made here: {'; '.join(made.degraded)}")
    yield made
    made.remove(NAME)
    made.close()
    assert not made.directory.exists()


def test_limits_are_what_the_kernel_reads() -> None:
    limits = CgroupLimits(1.5, 200_000, 1 << 30, 64, "8:0", io_bytes=1000, io_operations=10)
    assert limits.files() == {
        "cpu": {"cpu.max": "150000 100000", "cpu.weight": "10000"},
        "memory": {"memory.max": "1073741824", "memory.oom.group": "1"},
        "pids": {"pids.max": "64"},
        "io": {"io.max": "8:0 rbps=1000 wbps=1000 riops=10 wiops=10"},
    }
    assert CgroupLimits(0.001, 100, 1, 1).files()["cpu"]["cpu.max"] == "1000 100000"  # the kernel's least
    assert LIMITS.files()["io"] == {}


def test_the_whole_disk_of_a_partition() -> None:
    device = cgroup.block_device(Path("/"))
    assert device == "" or not Path(f"/sys/dev/block/{device}/partition").exists()
    assert cgroup.block_device(Path("/proc")) == ""


async def test_a_process_is_moved_and_ended_with_its_group(groups: Cgroups, tmp_path: Path) -> None:
    group = groups.make(NAME, LIMITS)
    assert group is not None
    process = await host_process.spawn(
        ["sh", "-c", "sleep 60 & sleep 60"], netns=None, stderr_path=tmp_path / "log", cgroup=group
    )
    await process.joined_cgroup()
    assert str(process.pid) in (group / "cgroup.procs").read_text().split()
    groups.remove(NAME)
    assert not group.exists()
    assert (await process.wait()).signal == 9
    groups.remove(NAME)  # absence is success


async def test_a_process_that_cannot_be_moved_says_so(tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").symlink_to("/dev/full")
    process = await host_process.spawn(["sleep", "60"], netns=None, stderr_path=tmp_path / "log", cgroup=tmp_path)
    with pytest.raises(VmmError, match="cannot move process"):
        await process.joined_cgroup()
    await process.kill()


async def test_a_group_that_is_not_there_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(VmmError, match="cannot start"):
        await host_process.spawn(["sleep", "60"], netns=None, stderr_path=tmp_path / "log", cgroup=tmp_path / "absent")


def test_a_group_above_that_has_others_in_it_stays(groups: Cgroups) -> None:
    groups.make(NAME, LIMITS)
    groups.close()
    assert groups.directory is not None
    assert groups.directory.exists()


def test_a_group_above_that_another_agent_removed_is_made_again(groups: Cgroups) -> None:
    Cgroups.open(groups.parent).close()
    group = groups.make(NAME, LIMITS)
    assert group is not None
    assert group.is_dir()


def test_a_limit_that_the_kernel_refuses(groups: Cgroups) -> None:
    if not groups.controllers:
        pytest.skip("no controller is handed on here")
    with pytest.raises(HostError, match="cannot make the cgroup"):
        groups.make(NAME, CgroupLimits(1, 0, 1, 1))


def test_without_the_hierarchy_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "hierarchy", lambda: None)
    none = Cgroups.open("/sandboxd")
    assert none.make(NAME, LIMITS) is None
    assert not none.out_of_memory(NAME)
    none.remove(NAME)
    none.close()
    assert "cgroup v2 is not mounted" in none.degraded[0]


def test_an_empty_parent_means_none() -> None:
    none = Cgroups.open("")
    assert none.make(NAME, LIMITS) is None
    assert "cgroups.parent is empty" in none.degraded[0]


def test_where_it_cannot_be_made_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "hierarchy", lambda: Path("/proc/self"))
    assert "cannot make the cgroup /x" in Cgroups.open("/x").degraded[0]


def test_controllers_that_are_lacking_are_named(groups: Cgroups) -> None:
    told = " ".join(groups.degraded)
    for name in cgroup.CONTROLLERS:
        assert (name in groups.controllers) != (name in told)
    found = subprocess.run(["cat", f"{groups.directory}/cgroup.subtree_control"], capture_output=True, check=True)
    assert groups.controllers == set(found.stdout.decode().split()) & set(cgroup.CONTROLLERS)
