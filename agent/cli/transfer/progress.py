"""Counts and progress bar of one `cp`, and the pool that copies several files at a time."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

from agent.cli import output

_CONCURRENCY = 8


class Transfer:
    """Counts of copied files and bytes; inside `with`, a progress bar on stderr if that is a terminal."""

    def __init__(self) -> None:
        self.files = self.directories = self.links = self.bytes = 0
        self.skipped: list[str] = []
        self._bar: Any = None
        self._task: Any = None

    def expect(self, size_bytes: int) -> None:
        """Set the total for the progress bar."""
        if self._bar is not None:
            self._bar.update(self._task, total=size_bytes)

    def advance(self, size_bytes: int) -> None:
        """Add copied bytes."""
        self.bytes += size_bytes
        if self._bar is not None:
            self._bar.update(self._task, advance=size_bytes)

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and not output.json_enabled():
            self._bar = _bar()
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    return Progress(
        BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip


class WorkerPool:
    """Runs up to eight copies at a time inside `async with`; the first error cancels the others and is raised."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(_CONCURRENCY)
        self._group = asyncio.TaskGroup()

    async def start(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Wait for a free slot, then run `work()` as a task."""
        await self._slots.acquire()
        self._group.create_task(self._run(work))

    async def _run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        finally:
            self._slots.release()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._group.__aexit__(kind, error, traceback)
        except BaseExceptionGroup as group:
            raise _first(group) from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error that is not itself a group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
