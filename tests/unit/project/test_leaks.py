"""The leak check finds what it should, quickly, and removes it."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.daemon.host.cgroup import CgroupLimits, Cgroups
from tests.support import leaks

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace, so it needs root")


def test_finds_and_ends_a_process() -> None:
    before = leaks.snapshot()
    process = subprocess.Popen(["sleep", "60"])
    left = leaks.wait_for_leaks(before, grace_s=0)
    leaks.clean(left)
    process.returncode = -9  # reaped by the clean-up
    assert [pid for pid, _name in left.processes] == [process.pid]
    assert not leaks.snapshot().since(before).describe()


def test_finds_a_process_of_this_run_that_is_nobody_s_child(tmp_path: Path) -> None:
    """A VMM outlives a daemon that is killed; it carries its sandbox's name, as this program does."""
    program = tmp_path / f"{leaks.PREFIX}0123"
    shutil.copy("/bin/sleep", program)
    before = leaks.snapshot()
    start = ["sh", "-c", f"{program} 60 >/dev/null 2>&1 & echo $!"]
    ours = int(subprocess.run(start, capture_output=True, check=True).stdout)
    stranger = int(subprocess.run(start, capture_output=True, check=True, env={}).stdout)
    try:
        left = leaks.wait_for_leaks(before, grace_s=0)
        assert left.describe() == [f"process {ours} ({program.name})"]
        leaks.clean(left)
        assert Path(f"/proc/{stranger}").exists()
    finally:
        os.kill(stranger, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while leaks.snapshot().since(before).describe() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert leaks.snapshot().since(before).describe() == []


def test_finds_a_zombie() -> None:
    before = leaks.snapshot()
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    left = leaks.wait_for_leaks(before, grace_s=0)
    process.wait()
    assert left.describe() == [f"process {process.pid} (true)"]


def test_waits_for_what_ends_by_itself() -> None:
    before = leaks.snapshot()
    process = subprocess.Popen(["sleep", "0.1"])
    threading.Thread(target=process.wait).start()
    assert not leaks.wait_for_leaks(before).describe()


def test_finds_and_removes_a_directory() -> None:
    before = leaks.snapshot()
    path = leaks.make_directory()
    (path / "deep").mkdir()
    left = leaks.wait_for_leaks(before, grace_s=0)
    leaks.clean(left)
    assert left.describe() == [f"directory {path}"]
    assert not path.exists()


def test_a_directory_of_another_run_is_no_leak() -> None:
    """Several runs share one host; each would remove what the others still use."""
    before = leaks.snapshot()
    path = Path(tempfile.mkdtemp(prefix=leaks.PREFIX))
    try:
        assert leaks.wait_for_leaks(before, grace_s=0).describe() == []
    finally:
        path.rmdir()


@needs_root
def test_finds_and_removes_a_namespace() -> None:
    before = leaks.snapshot()
    subprocess.run(["ip", "netns", "add", "sbx-leaktest"], check=True)
    left = leaks.wait_for_leaks(before, grace_s=0)
    leaks.clean(left)
    assert "network namespace sbx-leaktest" in left.describe()
    assert not leaks.snapshot().since(before).describe()


@contextmanager
def namespace(name: str) -> Iterator[None]:
    """Hold a network namespace during the body, unless the body has removed it."""
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield
    finally:
        if (leaks.NETNS_DIR / name).exists():
            subprocess.run(["ip", "netns", "delete", name], check=True)


@contextmanager
def orphan(*words: str, foreign: bool) -> Iterator[int]:
    """Run a program, the last one that `words` execute, that is no child of this process; yield its PID."""
    start = ["/bin/sh", "-c", '"$@" >/dev/null 2>&1 & echo $!', "sh", *words]
    pid = int(subprocess.run(start, capture_output=True, check=True, env={} if foreign else None).stdout)
    try:
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:2] != [b"60"]:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        yield pid
    finally:
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        select.select([pidfd], [], [])  # readable once it has ended
        os.close(pidfd)


def entering(name: str, *words: str) -> list[str]:
    return [str(shutil.which("nsenter")), f"--net={leaks.NETNS_DIR / name}", *words]


@needs_root
def test_a_namespace_in_which_another_run_has_a_process_is_no_leak() -> None:
    before = leaks.snapshot()
    with namespace("sbx-leakforeign"):
        with orphan(*entering("sbx-leakforeign", "/bin/sleep", "60"), foreign=True):
            raw = leaks.snapshot().since(before)
            assert raw.namespaces == {"sbx-leakforeign"}
            assert raw.mounts
            assert leaks.wait_for_leaks(before, grace_s=0).describe() == []
            leaks.clean(raw)
            assert leaks.snapshot().since(before) == raw
        left = leaks.wait_for_leaks(before, grace_s=0)
        assert left == raw  # its last process has ended
        leaks.clean(left)
        assert leaks.snapshot().since(before).describe() == []


@needs_root
def test_a_namespace_with_a_process_of_this_run_is_a_leak() -> None:
    before = leaks.snapshot()
    with namespace("sbx-leakours"), orphan(*entering("sbx-leakours", "/bin/sleep", "60"), foreign=False):
        assert leaks.wait_for_leaks(before, grace_s=0).namespaces == {"sbx-leakours"}


@needs_root
def test_all_of_a_sandbox_of_another_run_is_spared(tmp_path: Path) -> None:
    """Its VMM carries the first fifteen bytes of its id, and need not be in its namespace yet."""
    sandbox_id = "sbx-0123456789abcdef"
    vmm = tmp_path / sandbox_id
    shutil.copy("/bin/sleep", vmm)
    groups = Cgroups.open("/sandboxd-leaks")
    before = leaks.snapshot()
    with namespace(sandbox_id):
        groups.make(sandbox_id, CgroupLimits(1, 100, 1 << 30, 64))
        try:
            with orphan(str(vmm), "60", foreign=True):
                assert leaks.wait_for_leaks(before, grace_s=0).describe() == []
            left = leaks.wait_for_leaks(before, grace_s=0)
            assert left.namespaces == {sandbox_id}
            assert len(left.cgroups) == (groups.directory is not None)
        finally:
            leaks.clean(leaks.snapshot().since(before))
            groups.close()


@needs_root
def test_a_cgroup_with_a_process_of_another_run_is_no_leak() -> None:
    groups = Cgroups.open("/sandboxd-leaks")
    if groups.directory is None:
        pytest.skip("this host has no cgroup v2")
    before = leaks.snapshot()
    made = groups.make("sbx-shared", CgroupLimits(1, 100, 1 << 30, 64))
    assert made is not None
    try:
        with orphan("/bin/sleep", "60", foreign=True) as stranger:
            (made / "cgroup.procs").write_text(str(stranger))
            assert leaks.wait_for_leaks(before, grace_s=0).describe() == []
        with orphan("/bin/sleep", "60", foreign=False) as ours:
            (made / "cgroup.procs").write_text(str(ours))
            assert leaks.wait_for_leaks(before, grace_s=0).cgroups == {str(made)}
    finally:
        leaks.clean(leaks.snapshot().since(before))
        groups.close()
    assert leaks.snapshot().since(before).describe() == []


def test_is_cheap() -> None:
    rounds = 20
    start = time.process_time()  # CPU time: on a busy host the wait for a CPU is not the check's cost
    for _ in range(rounds):
        leaks.snapshot()
    assert (time.process_time() - start) / rounds < 0.02


@needs_root
def test_finds_and_removes_a_cgroup() -> None:
    groups = Cgroups.open("/sandboxd-leaks")
    if groups.directory is None:
        pytest.skip("this host has no cgroup v2")
    before = leaks.snapshot()
    made = groups.make("sbx-leaked", CgroupLimits(1, 100, 1 << 30, 64))
    left = leaks.snapshot().since(before)
    leaks.clean(left)
    groups.close()
    assert left.describe() == [f"cgroup {made}"]
    assert not leaks.snapshot().since(before).describe()
