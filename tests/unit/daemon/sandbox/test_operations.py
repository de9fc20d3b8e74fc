"""Operations of one sandbox run one at a time, to their end or undone."""

from __future__ import annotations

import asyncio

import pytest

from agent.common.errors import HostError, InvalidState
from agent.daemon.sandbox.lifecycle.operations import Operations
from tests.support.stored_changes import ID, until


def tasks_of(sandbox_id: str) -> list[str]:
    return [name for task in asyncio.all_tasks() if (name := task.get_name()).endswith(sandbox_id)]


async def test_operations_run_one_at_a_time_and_end_with_a_delete() -> None:
    operations, seen = Operations(ID), []
    started = asyncio.Event()

    async def endless() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            seen.append("undone")

    async def never() -> None:
        seen.append("ran")

    calls = [asyncio.create_task(operations.run("test", work)) for work in (endless, never)]
    await started.wait()
    await operations.start_delete(operations.cancel)
    assert seen == ["undone"]
    for call in calls:
        with pytest.raises(InvalidState, match="was deleted while its test was in progress"):
            await call
    with pytest.raises(InvalidState, match="is being deleted"):
        await operations.run("test", never)
    assert (seen, tasks_of(ID)) == (["undone"], [])


async def test_a_failure_after_the_caller_has_left_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    operations, go_on = Operations(ID), asyncio.Event()

    async def fail() -> None:
        await go_on.wait()
        raise HostError("no luck")

    call = asyncio.create_task(operations.run("test", fail))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.wait({call})
    go_on.set()
    await until(lambda: not tasks_of(ID))
    await asyncio.sleep(0)
    assert "no luck" in "".join(capsys.readouterr())
