"""Sets of tasks."""

from __future__ import annotations

import asyncio
import gc

from agent.common.aio import TaskSet


async def test_wait_includes_tasks_that_tasks_spawn() -> None:
    tasks, ended = TaskSet(), []

    async def second() -> None:
        await asyncio.sleep(0)
        ended.append("second")

    async def first() -> None:
        await asyncio.sleep(0)
        tasks.spawn(second())
        ended.append("first")

    tasks.spawn(first())
    gc.collect()
    await tasks.wait()
    assert ended == ["first", "second"]


async def test_cancel_waits_for_the_cleanup_of_tasks() -> None:
    tasks, started, ended = TaskSet(), asyncio.Event(), []

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    task = tasks.spawn(work())
    await started.wait()
    await tasks.cancel()
    assert ended == [True]
    assert task.cancelled()


async def test_a_failed_task_is_neither_raised_nor_kept() -> None:
    tasks = TaskSet()

    async def fail() -> None:
        raise ValueError("x")

    task = tasks.spawn(fail())
    await tasks.wait()
    assert isinstance(task.exception(), ValueError)
    await tasks.cancel()
