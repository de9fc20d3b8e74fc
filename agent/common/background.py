"""Supervisor of background loops: it restarts a loop that failed, with backoff, and knows which loops are failing.

A bare `asyncio.create_task(loop())` ends for good at its first unexpected exception, and the process looks healthy all
the same. Tenacity does not fit: its waits never start over after a long successful run, and it has no state that a
health check could read.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from agent.common.aio import cancel_and_wait
from agent.common.errors import AgentError

_MAX_DOUBLINGS = 32
_MAX_ERROR_CHARS = 200


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses before restarts: `first_s`, doubled per failure up to `last_s`, the upper half of it random.

    :param settle_s: a loop that ran this long after a restart has recovered, and its next pause is `first_s` again.
        It must exceed the time that the loop needs to fail.
    """

    first_s: float = 0.1
    last_s: float = 30.0
    settle_s: float = 10.0

    def pause_s(self, failures: int) -> float:
        """Return a random pause after this many failures (from 1) without a recovery, so that nodes do not align."""
        longest_s = min(self.first_s * 2.0 ** min(failures - 1, _MAX_DOUBLINGS), self.last_s)
        return longest_s * random.uniform(0.5, 1.0)  # noqa: S311  jitter, not a secret


DEFAULT = Backoff()
QUICK = Backoff(last_s=1.0)  # for loops whose absence is noticed within seconds


class Observer(Protocol):
    """Log and metrics of a program for its background loops."""

    def on_failure(self, loop: str, error: BaseException, retry_in_s: float | None) -> None:
        """Record a failure. :param retry_in_s: None if the loop failed while it was stopped."""

    def on_state(self, loop: str, *, failing: bool) -> None:
        """Record whether a loop is failing; called at its start, at each change and at its end."""


class BackgroundLoop:
    """One supervised loop, made by `Supervisor.start`. `last_error` is "" unless the loop is failing."""

    def __init__(
        self, name: str, factory: Callable[[], Awaitable[None]], backoff: Backoff, supervisor: Supervisor
    ) -> None:
        self.name = name
        self.last_error = ""
        self._factory = factory
        self._backoff = backoff
        self._supervisor = supervisor
        self._failures = 0  # since the last recovery
        self._task = asyncio.create_task(self._run(), name=f"background-{name}")

    async def stop(self) -> None:
        """Cancel the loop and wait until it has ended. Idempotent."""
        await cancel_and_wait(self._task)
        self._supervisor.forget(self)  # a task that is cancelled before its first step runs none of its code

    async def _run(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            while (failure := await self._attempt()) is not None:
                if task.cancelling():
                    self._supervisor.report(self, failure, None)
                    return
                self._failures += 1
                self.last_error = describe(failure)
                pause_s = self._backoff.pause_s(self._failures)
                self._supervisor.report(self, failure, pause_s)
                await asyncio.sleep(pause_s)
        finally:
            self._supervisor.forget(self)

    async def _attempt(self) -> BaseException | None:
        """Run the loop once; return the exception that ended it, None if it returned."""
        task = asyncio.current_task()
        assert task is not None
        settling = asyncio.get_running_loop().call_later(self._backoff.settle_s, self._settle)
        try:
            await self._factory()
        except asyncio.CancelledError as error:
            if task.cancelling():
                raise
            return error  # of a future that the loop awaited: this task was not cancelled
        except Exception as error:  # noqa: BLE001  a supervisor restarts after any failure
            return error
        finally:
            settling.cancel()
        return None

    def _settle(self) -> None:
        self._failures = 0
        if self.last_error:
            self.last_error = ""
            self._supervisor.note(self)


class Supervisor:
    """All background loops of one process. An async context manager: leaving it stops them, the newest first."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._loops: dict[str, BackgroundLoop] = {}
        self.on_change: set[Callable[[], None]] = set()  # called after a failure, a recovery, and an end

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for loop in reversed(list(self._loops.values())):
            await loop.stop()

    def start(self, name: str, factory: Callable[[], Awaitable[None]], backoff: Backoff = DEFAULT) -> BackgroundLoop:
        """Run `factory()` in a task, again after each exception, until it returns or is stopped.

        :param name: label of metrics: one of a small fixed set, never an id of a sandbox.
        :raises ValueError: a loop of this name runs already.
        """
        if name in self._loops:
            raise ValueError(f"the background loop {name} runs already")
        loop = self._loops[name] = BackgroundLoop(name, factory, backoff, self)
        self._observer.on_state(name, failing=False)
        return loop

    @property
    def failing(self) -> Mapping[str, str]:
        """Names of the loops that failed and have not recovered yet, with their last error."""
        return {loop.name: loop.last_error for loop in self._loops.values() if loop.last_error}

    def sentences(self) -> tuple[str, ...]:
        """Return a sentence for people about each failing loop."""
        return tuple(f"background loop {name} fails and is restarted: {error}" for name, error in self.failing.items())

    def report(self, loop: BackgroundLoop, failure: BaseException, retry_in_s: float | None) -> None:
        """Record a failure of a loop; for `BackgroundLoop`."""
        with contextlib.suppress(Exception):  # a log on a full disk must not end the loop after all
            self._observer.on_failure(loop.name, failure, retry_in_s)
        self.note(loop)

    def note(self, loop: BackgroundLoop) -> None:
        """Record the state of a loop and notify; for `BackgroundLoop`."""
        with contextlib.suppress(Exception):  # as above
            self._observer.on_state(loop.name, failing=bool(loop.last_error))
            for notify in list(self.on_change):
                notify()

    def forget(self, loop: BackgroundLoop) -> None:
        """Remove a loop that has ended; for `BackgroundLoop`. Idempotent."""
        if self._loops.get(loop.name) is loop:
            del self._loops[loop.name]
            loop.last_error = ""
            self.note(loop)


def describe(error: BaseException) -> str:
    """Return one bounded line: the message of an `AgentError`, type and message of any other exception."""
    text = error.message if isinstance(error, AgentError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:_MAX_ERROR_CHARS]
