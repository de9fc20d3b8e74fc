"""Run the operations of a sandbox in tasks of its own: callers cannot cancel them, a delete can."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from agent.common.errors import InvalidState
from agent.common.telemetry import log
from agent.daemon.sandbox.lifecycle.entry import Entry

_T = TypeVar("_T")


class Operations:
    """The one recipe for work on a sandbox: own task, the sandbox's lock, and an error if it is deleted meanwhile.

    gRPC cancels the handler of a client that leaves. Work that has changed one of memory, disk, kernel and guest must
    not stop there, so the handler only waits for it. The tasks are kept in `Entry.working`, the lock is
    `Entry.changing`.
    """

    async def run(
        self, entry: Entry, name: str, work: Callable[[], Coroutine[Any, Any, _T]], *, exclusive: bool = True
    ) -> _T:
        """Run `work` to its end in a task of the sandbox and return its result; `name` is a noun for messages.

        :param exclusive: hold the sandbox's lock. Without it `work` must be safe beside any other operation.
        :raises InvalidState: the sandbox is being deleted, or was deleted before `work` ended.
        """

        async def locked() -> _T:
            async with self.exclusive(entry):
                return await work()

        result = await self.join(entry, name, self.start(entry, name, locked if exclusive else work))
        _refuse_deleting(entry)
        return result

    def start(self, entry: Entry, name: str, work: Callable[[], Coroutine[Any, Any, _T]]) -> asyncio.Task[_T]:
        """Start `work` in a task of the sandbox, without its lock, and return the task.

        :raises InvalidState: the sandbox is being deleted; the delete has cancelled its tasks already.
        """
        _refuse_deleting(entry)
        task = asyncio.create_task(work(), name=f"{name}-{entry.record.id}")
        entry.working.add(task)
        task.add_done_callback(entry.working.discard)
        return task

    async def join(self, entry: Entry, name: str, task: asyncio.Task[_T]) -> _T:
        """Wait for a task of the sandbox and return its result; cancelling the caller leaves the task alone.

        :raises InvalidState: a delete has cancelled the task.
        """
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise InvalidState(
                    f"sandbox {entry.record.id} was deleted while its {name} was in progress", reason="SANDBOX_DELETED"
                ) from None
            task.add_done_callback(_log_failure)  # the caller has left: no answer tells of it
            raise

    @contextlib.asynccontextmanager
    async def exclusive(self, entry: Entry) -> AsyncIterator[None]:
        """Hold the lock of a sandbox: one operation changes it at a time.

        :raises InvalidState: a delete began before the lock was free.
        """
        async with entry.changing:
            _refuse_deleting(entry)
            yield

    async def cancel(self, entry: Entry) -> None:
        """Cancel all tasks of a sandbox and wait until each has undone its work."""
        tasks = list(entry.working)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _refuse_deleting(entry: Entry) -> None:
    if entry.deleting is not None:
        raise InvalidState(f"sandbox {entry.record.id} is being deleted", reason="SANDBOX_DELETING")


def _log_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("an operation failed after its caller had left", task=task.get_name(), error=str(error))
