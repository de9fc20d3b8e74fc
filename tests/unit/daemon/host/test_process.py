"""VMM processes with real programs: started, watched, adopted, ended, and never confused with others."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.common.errors import VmmError
from agent.daemon.host import process as host_process
from agent.daemon.host.process import adopt, spawn, start_time

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "vmm.log"


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is not of the module under test."""
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child
        child.kill()


def pidfds() -> int:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum("pidfd" in os.readlink(link) for link in links if os.path.lexists(link))


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_exit_status_and_the_end_of_stderr(log: Path) -> None:
    process = await spawn(
        ["sh", "-c", "yes line | head -c 100000 >&2; echo the end >&2; exit 3"], netns=None, stderr_path=log
    )
    ended = await process.wait()
    assert (ended.exit_code, ended.signal, ended.describe()) == (3, None, "exited with status 3")
    assert len(ended.stderr_tail) <= 4096
    assert ended.stderr_tail.endswith("line\nthe end")
    assert not process.alive


async def test_kill_is_idempotent_and_any_number_may_wait(log: Path) -> None:
    process = await spawn(["sleep", "60"], netns=None, stderr_path=log)
    assert process.alive
    waiters = [asyncio.create_task(process.wait()) for _ in range(3)]
    waiters[0].cancel()
    await asyncio.wait(waiters[:1])
    assert process.alive
    await process.kill()
    await process.kill()
    assert {(await waiter).signal for waiter in waiters[1:]} == {signal.SIGKILL}
    assert not exists(process.pid)
    assert pidfds() == 0


async def test_the_child_is_alone(log: Path) -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    listing = "import os; print(os.listdir('/proc/self/fd'), os.getsid(0) == os.getpid(), os.getcwd())"
    process = await spawn([sys.executable, "-c", listing], netns=None, stderr_path=log, pass_fds=[read_end])
    await process.wait()
    os.close(read_end)
    os.close(write_end)
    # Standard streams, what was passed, and the directory that it lists.
    kept, session, directory = process.stderr_tail().rsplit(" ", 2)
    assert (len(kept.split(",")), f"'{read_end}'" in kept, session, directory) == (5, True, "True", "/")


async def test_output_is_appended(log: Path) -> None:
    for word in ("one", "two"):
        process = await spawn(["echo", word], netns=None, stderr_path=log)
        await process.wait()
    assert process.stderr_tail() == "one\ntwo"


@pytest.mark.parametrize("argv", [["/no/such/vmm"], ["/etc/passwd"], ["sleep", "a\0b"]])
async def test_a_program_that_cannot_be_started(argv: list[str], log: Path) -> None:
    async with asyncio.timeout(5):
        with pytest.raises(VmmError, match="cannot start") as caught:
            await spawn(argv, netns=None, stderr_path=log)
    assert caught.value.reason == "VMM_NOT_STARTED"


async def test_a_namespace_that_does_not_exist(log: Path) -> None:
    with pytest.raises(VmmError, match="cannot start"):
        await spawn(["sleep", "60"], netns="sbx-none", stderr_path=log)


async def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(VmmError, match="cannot start"):
        await spawn(["sleep", "60"], netns=None, stderr_path=tmp_path / "none" / "log")


@pytest.mark.parametrize("cancels", [1, 2, 5])
async def test_a_cancelled_spawn_leaves_nothing(monkeypatch: pytest.MonkeyPatch, log: Path, cancels: int) -> None:
    started, go_on, pids = threading.Event(), threading.Event(), []
    real = host_process._spawn_here

    def slow(*args: object) -> int:
        started.set()
        assert go_on.wait(10)
        pids.append(real(*args))  # type: ignore[arg-type]
        return pids[0]

    monkeypatch.setattr(host_process, "_spawn_here", slow)
    task = asyncio.create_task(spawn(["sleep", "60"], netns=None, stderr_path=log))
    await asyncio.to_thread(started.wait)
    for _ in range(cancels):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    go_on.set()
    await asyncio.wait({task})
    assert task.cancelled()
    assert not exists(pids[0])


async def test_a_cancelled_spawn_of_what_cannot_start(monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    task = asyncio.create_task(spawn(["/no/such/vmm"], netns=None, stderr_path=log))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# -- found again -------------------------------------------------------------------------------------------------------


async def test_an_adopted_process_is_watched_and_ended(stranger: subprocess.Popen[bytes], log: Path) -> None:
    process = adopt(stranger.pid, start_time(stranger.pid), log)
    assert process is not None
    assert process.alive
    await process.kill()
    ended = await process.wait()
    # Its status belongs to its parent.
    assert (ended.exit_code, ended.signal, ended.describe()) == (None, None, "ended")
    assert stranger.wait() == -signal.SIGKILL


async def test_a_pid_of_another_process_is_refused(stranger: subprocess.Popen[bytes], log: Path) -> None:
    started = start_time(stranger.pid)
    for pid, time in ((stranger.pid, started + 1), (stranger.pid, 0), (1 << 22, started), (0, 0), (-1, started)):
        assert adopt(pid, time, log) is None
    assert stranger.poll() is None
    assert pidfds() == 0


async def test_a_pid_that_changes_hands_while_it_is_looked_at(
    stranger: subprocess.Popen[bytes], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that we want ends, and `stranger` gets its PID, between any two looks."""
    wanted = start_time(stranger.pid) - 5
    real_open = os.pidfd_open
    for looks in range(1, 4):
        seen = 0

        def look(pid: int, looks: int = looks) -> int:
            nonlocal seen
            seen += 1
            return wanted if seen <= looks else wanted + 5

        def open_pidfd(pid: int) -> int:
            nonlocal seen
            seen = 99
            return real_open(pid)

        monkeypatch.setattr(host_process, "start_time", look)
        monkeypatch.setattr(os, "pidfd_open", open_pidfd)
        assert adopt(stranger.pid, wanted, log) is None
        assert pidfds() == 0


async def test_a_process_that_is_gone_is_not_adopted(stranger: subprocess.Popen[bytes], log: Path) -> None:
    started = start_time(stranger.pid)
    stranger.kill()
    stranger.wait()
    assert adopt(stranger.pid, started, log) is None


def test_start_time_of_a_process_with_a_hostile_name(tmp_path: Path) -> None:
    program = tmp_path / "a) 1 2 3 ("
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as child:
        words = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        assert start_time(child.pid) == int(words[19]) > 0
        child.kill()
    assert start_time(child.pid) == 0
