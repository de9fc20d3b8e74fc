"""Tasks and lock of one sandbox: its operations, its delete and its monitor."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from agent.common.errors import InvalidState
from agent.common.telemetry import log

_T = TypeVar("_T")


class Operations:
    """Every task that works on one sandbox, and the lock for changes of it.

    gRPC cancels the handler of a client that leaves. Work that has changed memory, disk, kernel or guest must not stop
    half-way, so it runs in a task of the sandbox and the handler only waits for it. A delete cancels these tasks; each
    of them undoes its work.
    """

    def __init__(self, sandbox_id: str) -> None:
        self._sandbox_id = sandbox_id
        self._tasks: set[asyncio.Task[Any]] = set()
        self._changing = asyncio.Lock()
        self._creating: asyncio.Task[None] | None = None
        self._deleting: asyncio.Task[None] | None = None
        self._monitor: asyncio.Task[None] | None = None

    @property
    def creating(self) -> asyncio.Task[None] | None:
        """Task of the create, ended or not; None for a sandbox that an earlier agent created."""
        return self._creating

    @property
    def deleting(self) -> bool:
        """Whether a delete is in progress or done."""
        return self._deleting is not None

    async def run(
        self, name: str, work: Callable[[], Coroutine[Any, Any, _T]], *, exclusive: bool = True
    ) -> _T:  # fmt: skip
        """Run `work` to its end in a task of the sandbox and return its result.

        :param name: a noun for messages and the task's name.
        :param exclusive: hold the sandbox's lock. Without it `work` must be safe beside any other operation.
        :raises InvalidState: the sandbox is being deleted, or was deleted before `work` ended.
        """

        async def locked() -> _T:
            async with self.exclusive():
                return await work()

        result = await self.join(name, self.start(name, locked if exclusive else work))
        self._refuse_deleting()
        return result

    def start(self, name: str, work: Callable[[], Coroutine[Any, Any, _T]]) -> asyncio.Task[_T]:
        """Start `work` in a task of the sandbox, without its lock, and return the task.

        :raises InvalidState: the sandbox is being deleted; the delete has cancelled its tasks already.
        """
        self._refuse_deleting()
        task = asyncio.create_task(work(), name=f"{name}-{self._sandbox_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def join(self, name: str, task: asyncio.Task[_T]) -> _T:
        """Wait for a task of the sandbox and return its result; cancelling the caller leaves the task alone.

        :raises InvalidState: a delete has cancelled the task.
        """
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise InvalidState(
                    f"sandbox {self._sandbox_id} was deleted while its {name} was in progress", reason="SANDBOX_DELETED"
                ) from None
            task.add_done_callback(_log_failure)  # no response reports it: the caller has left
            raise

    @contextlib.asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Hold the lock of the sandbox: one operation changes it at a time.

        :raises InvalidState: a delete began before the lock was free.
        """
        async with self._changing:
            self._refuse_deleting()
            yield

    async def cancel(self) -> None:
        """Cancel all operations and the monitor, and wait until each operation has undone its work."""
        await self.stop_monitor()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self.stop_monitor()  # a cancelled operation may have restarted it

    # -- create, delete, monitor ---------------------------------------------------------------------------------------

    def start_create(self, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Start the create of the sandbox and return its task."""
        self._creating = self.start("create", work)
        return self._creating

    async def join_create(self, name: str = "create") -> None:
        """Wait for the create of the sandbox; return at once for one that an earlier agent created.

        :raises InvalidState: a delete has cancelled the create.
        :raises AgentError: the create failed.
        """
        if self._creating is not None:
            await self.join(name, self._creating)

    def start_delete(self, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Return the task of the delete, started with `work` unless there is one; a failed delete can be retried."""
        if self._deleting is None:
            self._deleting = asyncio.create_task(self._delete(work), name=f"delete-{self._sandbox_id}")
        return self._deleting

    async def _delete(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except BaseException:
            self._deleting = None
            raise

    def start_monitor(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start the task that watches the sandbox's VM."""
        self._monitor = asyncio.create_task(work(), name=f"monitor-{self._sandbox_id}")

    async def stop_monitor(self) -> None:
        """Cancel the monitor and wait for its end. Idempotent."""
        if self._monitor is not None:
            self._monitor.cancel()
            await asyncio.wait({self._monitor})

    def _refuse_deleting(self) -> None:
        if self._deleting is not None:
            raise InvalidState(f"sandbox {self._sandbox_id} is being deleted", reason="SANDBOX_DELETING")


def _log_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("an operation failed after its caller had left", task=task.get_name(), error=str(error))
