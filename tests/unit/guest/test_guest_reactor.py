"""The guest's scheduler: tasks, descriptors, timers, signals, cancellation."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guest import reactor
from guest.reactor import Cancelled, Task, Waiters

pytestmark = pytest.mark.timeout(20)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A reactor of this test alone."""
    for name, value in (("_descriptors", {}), ("_timers", []), ("_epoll", None)):
        monkeypatch.setattr(reactor, name, value)
    reactor._reactor_ready.clear()
    yield
    reactor._reactor_ready.clear()
    if reactor._epoll is not None:
        reactor._epoll.close()


def run(*tasks: Task) -> None:
    reactor.run_until(lambda: all(task.done for task in tasks))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, two = socket.socketpair()
    with one, two:
        one.setblocking(False)
        two.setblocking(False)
        reactor.register(one.fileno())
        yield one, two
        reactor.unregister(one.fileno())


def test_tasks_run_in_order_and_say_how_they_ended(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[object] = []

    async def work(name: str) -> None:
        seen.append(name)
        await reactor.checkpoint()
        seen.append(name.upper())
        if name == "b":
            raise ValueError("as asked")

    tasks = [reactor.spawn(work(name)) for name in "abc"]
    run(*tasks)
    assert seen == ["a", "b", "c", "A", "B", "C"]
    assert [type(task.failure) for task in tasks] == [type(None), ValueError, type(None)]
    assert "ValueError: as asked" in capsys.readouterr().err


def test_on_done_replaces_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    async def fail() -> None:
        raise ValueError

    ended: list[Task] = []
    task = reactor.spawn(fail())
    task.on_done = ended.append
    run(task)
    assert (ended, capsys.readouterr().err) == ([task], "")


@pytest.mark.parametrize("how", ["before it ran", "parked", "woken", "twice"])
def test_cancellation(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    waiters, seen = Waiters(), []

    async def work() -> None:
        try:
            seen.append("start")
            await waiters.wait()
            seen.append("not reached")
        except Cancelled:
            seen.append("cancelled")
            raise
        finally:
            seen.append("end")

    task = reactor.spawn(work())
    if how != "before it ran":
        reactor.run_once()
    if how == "woken":
        waiters.wake()
    task.cancel()
    if how == "twice":
        task.cancel()
    run(task)
    task.cancel()
    assert seen == ([] if how == "before it ran" else ["start", "cancelled", "end"])
    assert isinstance(task.failure, Cancelled)
    assert not waiters._tasks
    assert capsys.readouterr().err == ""


def test_a_task_may_tidy_up_after_its_cancellation() -> None:
    async def work() -> None:
        try:
            await Waiters().wait()
        finally:
            await reactor.sleep(0.001)
            seen.append("tidy")

    seen: list[str] = []
    task = reactor.spawn(work())
    reactor.run_once()
    task.cancel()
    run(task)
    assert seen == ["tidy"]


def test_wake_is_for_those_who_wait_now() -> None:
    waiters, seen = Waiters(), []
    waiters.wake()

    async def work(name: str) -> None:
        await waiters.wait()
        seen.append(name)

    tasks = [reactor.spawn(work("a")), reactor.spawn(work("b"))]
    reactor.run_once()
    assert seen == []
    waiters.wake()
    run(*tasks)
    assert seen == ["a", "b"]


def test_sleep_takes_its_time_and_shorter_ones_end_first() -> None:
    seen: list[float] = []

    async def nap(seconds: float) -> None:
        start = time.monotonic()
        await reactor.sleep(seconds)
        assert time.monotonic() - start >= seconds
        seen.append(seconds)

    run(*[reactor.spawn(nap(seconds)) for seconds in (0.03, 0.01, 0.02, 0)])
    assert seen == [0, 0.01, 0.02, 0.03]


def test_a_reader_sees_every_byte(pair: tuple[socket.socket, socket.socket]) -> None:
    one, two = pair
    received = bytearray()

    async def read() -> None:
        while len(received) < 300_000:
            try:
                received.extend(one.recv(7000))
            except BlockingIOError:
                await reactor.readable(one.fileno())

    async def write() -> None:
        data = memoryview(bytes(300_000))
        reactor.register(two.fileno())
        while data:
            try:
                data = data[two.send(data) :]
            except BlockingIOError:
                await reactor.writable(two.fileno())
        reactor.unregister(two.fileno())

    run(reactor.spawn(read()), reactor.spawn(write()))
    assert len(received) == 300_000


def test_an_edge_that_came_before_anybody_waited_counts(pair: tuple[socket.socket, socket.socket]) -> None:
    one, two = pair
    two.send(b"x")
    reactor.spawn(reactor.checkpoint())
    reactor.run_once()
    task = reactor.spawn(reactor.readable(one.fileno()))
    run(task)
    second = reactor.spawn(reactor.readable(one.fileno()))
    reactor.spawn(reactor.checkpoint())
    reactor.run_once()
    assert not second.done
    two.close()
    run(second)


@pytest.mark.parametrize(("wait", "poke"), [(reactor.readable, reactor.poke), (reactor.writable, reactor.poke_writer)])
def test_poke_wakes_a_waiter(
    pair: tuple[socket.socket, socket.socket], wait: Callable[..., object], poke: Callable[[int], None]
) -> None:
    one, _ = pair

    async def consume_edges() -> None:
        await reactor.writable(one.fileno())
        await wait(one.fileno())  # type: ignore[misc]

    task = reactor.spawn(consume_edges())
    for _ in range(3):
        reactor.spawn(reactor.checkpoint())
        reactor.run_once()
    assert not task.done
    poke(one.fileno())
    run(task)
    poke(-1)


def test_unregister_wakes_waiters_and_is_idempotent(pair: tuple[socket.socket, socket.socket]) -> None:
    one, _ = pair
    task = reactor.spawn(reactor.readable(one.fileno()))
    reactor.spawn(reactor.checkpoint())
    reactor.run_once()
    reactor.unregister(one.fileno())
    reactor.unregister(one.fileno())
    run(task, reactor.spawn(reactor.readable(one.fileno())), reactor.spawn(reactor.writable(one.fileno())))


def test_a_busy_task_lets_others_run(pair: tuple[socket.socket, socket.socket]) -> None:
    one, two = pair
    turns = 0

    async def busy() -> None:
        nonlocal turns
        while not reading.done:
            turns += 1
            await reactor.checkpoint()
            if turns == 10:
                two.send(b"x")

    reading = reactor.spawn(reactor.readable(one.fileno()))
    run(reading, reactor.spawn(busy()))
    assert 10 <= turns < 20


def run_script(script: str) -> str:
    """Runs it in a process of its own: handlers belong to the whole process."""
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        check=True,
        text=True,
        timeout=5,
    ).stdout


def test_a_signal_between_the_last_look_and_the_wait_counts() -> None:
    script = """
import os, signal
from guest import reactor
waiters = reactor.watch_signal(signal.SIGUSR1)
async def work():
    os.kill(os.getpid(), signal.SIGUSR1)
    await waiters.wait()
task = reactor.spawn(work())
reactor.run_until(lambda: task.done)
print("woken")
"""
    assert run_script(script) == "woken\n"


def test_signals_wake_and_merge() -> None:
    script = """
import os, signal
from guest import reactor
waiters = reactor.watch_signal(signal.SIGUSR1)
others = reactor.watch_signal(signal.SIGUSR2)
seen = []
async def wait(which, name, count):
    for _ in range(count):
        await which.wait()
        seen.append(name)
tasks = [reactor.spawn(wait(waiters, 1, 3)), reactor.spawn(wait(others, 2, 1))]
reactor.spawn(reactor.checkpoint())
reactor.run_once()
for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1):
    os.kill(os.getpid(), number)
    for _ in range(3):
        reactor.spawn(reactor.checkpoint())
        reactor.run_once()
reactor.run_until(lambda: all(task.done for task in tasks))
print(seen)
"""
    assert run_script(script) == "[1, 1, 2, 1]\n"
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
