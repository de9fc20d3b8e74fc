"""Helpers for asyncio tasks: run work to completion, cancel tasks and wait for them, keep sets of tasks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


async def run_to_completion(work: Awaitable[_T]) -> _T:
    """Await `work` to completion even if cancelled; re-raise the cancellation afterwards.

    For work in a thread or a task that cannot be undone half-way: its cleanup must not begin before it has ended. After
    a cancellation the outcome stays in the future that was given, and a failure of the work is not reported.
    """
    future = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():  # the caller may be cancelled more than once
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # retrieved, lest asyncio logs it: the cancellation is what the caller gets
        raise


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until all have ended. Their results and exceptions are ignored. Idempotent."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class TaskSet:
    """Tasks that run until they end or are cancelled together.

    It keeps a reference to each: asyncio has only weak ones, so that a running task could be garbage-collected.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine in a task of this set."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def wait(self) -> None:
        """Wait until no task is left, including tasks that are spawned meanwhile."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def cancel(self) -> None:
        """Cancel the tasks that are in the set now, and wait until they have ended."""
        await cancel_and_wait(*self._tasks)
