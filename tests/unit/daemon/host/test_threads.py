"""Work in a thread of its own: results, errors, and results that nobody waits for any more."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from agent.common.errors import ResourceExhausted, VmmError
from agent.daemon.host import tap
from agent.daemon.host.process import spawn
from agent.daemon.host.threads import run_in_thread
from tests.support.children import children

pytestmark = pytest.mark.timeout(30)


async def test_result_of_a_named_thread_that_ends() -> None:
    thread = await run_in_thread("worker", threading.current_thread)
    assert (thread.name, thread.daemon, thread is threading.current_thread()) == ("worker", True, False)
    await asyncio.to_thread(thread.join, 5)
    assert not thread.is_alive()


@pytest.mark.parametrize("error", [OSError(errno.EPERM, "no"), KeyError("x"), SystemExit(3)])
async def test_any_exception_is_the_callers(error: BaseException) -> None:
    def work() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        await run_in_thread("worker", work)
    assert caught.value is error


async def test_result_after_cancellation_is_discarded() -> None:
    begun, go_on, discarded = threading.Event(), threading.Event(), asyncio.Event()
    results: list[int] = []

    def work() -> int:
        begun.set()
        assert go_on.wait(10)
        return 7

    def discard(result: int) -> None:
        results.append(result)
        discarded.set()

    future = run_in_thread("worker", work, discard=discard)
    await asyncio.to_thread(begun.wait)
    future.cancel()
    go_on.set()
    await discarded.wait()
    assert results == [7]


def test_result_after_the_loop_is_closed_is_discarded() -> None:
    go_on, discarded = threading.Event(), threading.Event()

    async def leave() -> None:
        run_in_thread("worker", lambda: go_on.wait(10), discard=lambda _: discarded.set())

    asyncio.run(leave())
    go_on.set()
    assert discarded.wait(10)


async def test_a_cancelled_open_tap_closes_its_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, closed = threading.Event(), threading.Event(), asyncio.Event()
    opened: list[int] = []

    def attach(name: str) -> int:
        begun.set()
        assert go_on.wait(10)
        opened.append(os.open("/dev/null", os.O_RDONLY))
        return opened[0]

    real_close = os.close

    def close(fd: int) -> None:
        real_close(fd)
        if opened and fd == opened[0]:
            closed.set()

    monkeypatch.setattr(tap, "attach", attach)
    monkeypatch.setattr(os, "close", close)
    task = asyncio.create_task(tap.open_tap("tap0", None))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    await asyncio.wait({task})
    go_on.set()
    await closed.wait()


class NoThread(threading.Thread):
    """A thread that cannot be started, as under a limit of tasks."""

    refused: tuple[str, ...] = ()

    def start(self) -> None:
        if self.name in self.refused:
            raise RuntimeError("can't start new thread")
        super().start()


@pytest.mark.parametrize("name", ["spawn", "join-cgroup"])
async def test_process_without_a_thread_for_it_is_not_left_behind(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup.procs").touch()
    before = children()
    monkeypatch.setattr(NoThread, "refused", (name,))
    monkeypatch.setattr(threading, "Thread", NoThread)
    with pytest.raises(ResourceExhausted, match="no more threads or processes") as caught:
        await spawn(["sleep", "60"], netns=None, stderr_path=tmp_path / "log", cgroup=tmp_path)
    assert caught.value.reason == "TOO_MANY_TASKS"
    assert children() == before


async def test_process_that_cannot_be_watched_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptor(pid: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", no_descriptor)
    before, files = children(), os.listdir("/proc/self/fd")
    with pytest.raises(VmmError, match="Too many open files"):
        await spawn(["sleep", "60"], netns=None, stderr_path=tmp_path / "log")
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == len(files)
