"""Awaiting work that cannot be undone half-way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


async def to_the_end(work: Awaitable[_T]) -> _T:
    """Awaits work that goes on in a thread or a task; a caller that is cancelled meanwhile gets that after its end.

    What undoes the work must come after it. The outcome of work whose caller was cancelled stays in the future that was
    given; its failure is not reported again.
    """
    future = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():  # however often the caller is cancelled
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # retrieved: the cancellation is what counts
        raise


async def quietly(*tasks: asyncio.Task[None]) -> None:
    """Awaits tasks that were cancelled; how they end is of no interest any more."""
    await asyncio.gather(*tasks, return_exceptions=True)


class TaskSet:
    """Tasks that run until they end or are cancelled together. asyncio alone keeps only weak references to tasks."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine in a task of this set."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def wait(self) -> None:
        """Wait until no task is left, including tasks that are spawned meanwhile."""
        while self._tasks:
            await quietly(*self._tasks)

    async def cancel(self) -> None:
        """Cancel the tasks of this moment and wait until they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await quietly(*tasks)
