"""A minimal event loop on epoll(7) for the guest's PID 1: tasks, descriptors, timers, wake-ups between tasks.

Not asyncio: in an emulated VM its import takes most of a second, and each event several times as long as here; the code
of an exec must take well under a millisecond. Single-threaded; one event loop per process.

Descriptors are registered once and edge-triggered: try the system call first, and await `readable` or `writable` only
after EAGAIN. A wake-up may be spurious.
"""

from __future__ import annotations

import heapq
import os
import select
import signal
import sys
import time
import traceback
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any

_READ = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP | select.EPOLLPRI
_WRITE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR


class Cancelled(BaseException):
    """Raised at an await of a task that is cancelled. A BaseException, so that `except Exception` does not catch it."""


class Task:
    """A running coroutine; `failure` is its exception, or None, once it is `done`."""

    __slots__ = ("_coroutine", "_park", "cancelled", "done", "failure", "on_done")

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._coroutine = coroutine
        self._park: Waiters | None = None
        self.cancelled = False
        self.done = False
        self.failure: BaseException | None = None
        self.on_done: Callable[[Task], None] | None = None

    def cancel(self) -> None:
        """Raise `Cancelled` in the task at its present or next await. Idempotent."""
        if not self.done and not self.cancelled:
            self.cancelled = True
            if self._park is not None:
                self._park.discard(self)
                _reactor_ready.append(self)


class Waiters:
    """Tasks that wait for a condition. `wake` is not remembered: callers of `wait` check their condition in a loop."""

    __slots__ = ("_tasks",)

    def __init__(self) -> None:
        self._tasks: list[Task] = []

    def wake(self) -> None:
        """Make all waiting tasks ready to run."""
        if self._tasks:
            for task in self._tasks:
                task._park = None
            _reactor_ready.extend(self._tasks)
            self._tasks.clear()

    def discard(self, task: Task) -> None:
        """Remove a task without waking it."""
        if task in self._tasks:
            self._tasks.remove(task)
        task._park = None

    @types.coroutine
    def wait(self) -> Generator[Waiters, None, None]:
        """Wait for the next `wake`."""
        yield self

    def park(self, task: Task) -> None:
        """Add a task that awaits this object. For the event loop only."""
        task._park = self
        self._tasks.append(task)


class _Descriptor:
    __slots__ = ("read_ready", "readers", "write_ready", "writers")

    def __init__(self) -> None:
        self.readers = Waiters()
        self.writers = Waiters()
        self.read_ready = False
        self.write_ready = False


_reactor_ready: deque[Task] = deque()
_descriptors: dict[int, _Descriptor] = {}
_timers: list[tuple[float, int, Waiters]] = []
_timer_count = 0
_epoll: select.epoll | None = None


def _poller() -> select.epoll:
    global _epoll  # noqa: PLW0603  one reactor per process, made on first use
    if _epoll is None:
        _epoll = select.epoll()
    return _epoll


def spawn(coroutine: Coroutine[Any, Any, None]) -> Task:
    """Start a task, which runs at the next turn. Its exception is printed to stderr unless `on_done` is set."""
    task = Task(coroutine)
    _reactor_ready.append(task)
    return task


def register(fd: int) -> None:
    """Watch a non-blocking descriptor. It must be unregistered before it is closed."""
    _poller().register(fd, _READ | _WRITE | select.EPOLLET)
    _descriptors[fd] = _Descriptor()


def unregister(fd: int) -> None:
    """Stop watching a descriptor, and wake the tasks that wait for it. Idempotent."""
    descriptor = _descriptors.pop(fd, None)
    if descriptor is not None:
        _poller().unregister(fd)
        descriptor.readers.wake()
        descriptor.writers.wake()


async def readable(fd: int) -> None:
    """Wait until a read from `fd` may succeed, after one that failed with EAGAIN."""
    descriptor = _descriptors.get(fd)
    if descriptor is None or descriptor.read_ready:
        if descriptor is not None:
            descriptor.read_ready = False
        return
    await descriptor.readers.wait()
    descriptor.read_ready = False


async def writable(fd: int) -> None:
    """Wait until a write to `fd` may succeed, after one that failed with EAGAIN."""
    descriptor = _descriptors.get(fd)
    if descriptor is None or descriptor.write_ready:
        if descriptor is not None:
            descriptor.write_ready = False
        return
    await descriptor.writers.wait()
    descriptor.write_ready = False


def poke(fd: int) -> None:
    """Make `readable(fd)` return, so that its caller reads once more. Ignored for a descriptor that is not watched."""
    descriptor = _descriptors.get(fd)
    if descriptor is not None:
        descriptor.read_ready = True
        descriptor.readers.wake()


def poke_writer(fd: int) -> None:
    """Make `writable(fd)` return, so that its caller tries once more. Ignored for a descriptor that is not watched."""
    descriptor = _descriptors.get(fd)
    if descriptor is not None:
        descriptor.write_ready = True
        descriptor.writers.wake()


async def sleep(seconds: float) -> None:
    """Wait at least `seconds`."""
    waiters = Waiters()
    call_later(seconds, waiters)
    await waiters.wait()


def call_later(seconds: float, waiters: Waiters) -> None:
    """Wake `waiters` once, after `seconds`."""
    global _timer_count  # noqa: PLW0603  breaks ties between equal deadlines
    _timer_count += 1
    heapq.heappush(_timers, (time.monotonic() + seconds, _timer_count, waiters))


_turn = Waiters()


async def checkpoint() -> None:
    """Yield: let all ready tasks run and all descriptors be polled first."""
    await _turn.wait()


def run_until(done: Callable[[], bool]) -> None:
    """Run the event loop until `done()` is true."""
    while not done():
        run_once()


def run_once(*, wait: bool = True) -> None:
    """Poll for events (waiting for one if `wait`), dispatch them, and run each ready task up to its next await."""
    _turn.wake()
    events = _poller().poll(_timeout() if wait else 0, 64)
    for fd, mask in events:
        descriptor = _descriptors.get(fd)
        if descriptor is None:
            continue
        if mask & _READ:
            descriptor.read_ready = True
            descriptor.readers.wake()
        if mask & _WRITE:
            descriptor.write_ready = True
            descriptor.writers.wake()
    _fire_timers()
    for _ in range(len(_reactor_ready)):
        _step(_reactor_ready.popleft())


def _timeout() -> float:
    if _reactor_ready:
        return 0
    if _timers:
        return max(0.0, _timers[0][0] - time.monotonic())
    return -1


def _fire_timers() -> None:
    if not _timers:
        return
    now = time.monotonic()
    while _timers and _timers[0][0] <= now:
        heapq.heappop(_timers)[2].wake()


def _step(task: Task) -> None:
    if task.done:
        return
    try:
        if task.cancelled:
            task.cancelled = False
            parked = task._coroutine.throw(Cancelled())
        else:
            parked = task._coroutine.send(None)
    except StopIteration:
        _finish(task, None)
    except BaseException as error:  # noqa: BLE001  whatever it is, the reactor goes on
        _finish(task, error)
    else:
        parked.park(task)


def _finish(task: Task, failure: BaseException | None) -> None:
    task.done = True
    task.failure = failure
    if task.on_done is not None:
        task.on_done(task)
    elif failure is not None and not isinstance(failure, Cancelled):
        traceback.print_exception(failure, file=sys.stderr)


def watch_signal(number: int) -> Waiters:
    """Return waiters that are woken after the signal arrives; several arrivals may cause one wake-up."""
    waiters = Waiters()
    _signal_waiters[number] = waiters
    if len(_signal_waiters) == 1:
        _start_signal_pipe()
    signal.signal(number, _on_signal)
    return waiters


_signal_waiters: dict[int, Waiters] = {}


def _on_signal(_number: int, _frame: object) -> None:
    """Do nothing: a handler runs between any two instructions, so a wake-up here could be lost before a wait."""


def _start_signal_pipe() -> None:
    """Wake waiters by signal numbers in the wake-up descriptor; it also ends epoll_wait (else restarted, PEP 475)."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    register(read_end)

    async def drain() -> None:
        while True:
            try:
                numbers = os.read(read_end, 512)
            except BlockingIOError:
                await readable(read_end)
                continue
            for number in set(numbers) & _signal_waiters.keys():
                _signal_waiters[number].wake()

    spawn(drain())
