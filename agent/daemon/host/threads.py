"""Blocking work in a thread of its own, as a future of the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from agent.common.errors import ResourceExhausted

_T = TypeVar("_T")


def run_in_thread(
    name: str, work: Callable[[], _T], *, discard: Callable[[_T], object] | None = None
) -> asyncio.Future[_T]:
    """Run `work` in a new thread that ends with it, and return a future of its result or exception.

    For work that changes its thread (its namespaces, say), which a pool must not get back. Cancelling the future does
    not stop the work.

    :param discard: releases a result that arrives after the future was cancelled, or the event loop closed. It must
        not block: it usually runs in the event loop.
    :raises ResourceExhausted: no thread can be started, because of a limit of tasks (TOO_MANY_TASKS).
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def deliver(result: _T) -> None:
        if not future.done():
            future.set_result(result)
        elif discard is not None:
            discard(result)

    def fail(error: BaseException) -> None:
        if not future.done():
            future.set_exception(error)

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  handed to the loop
            _call_soon(loop, fail, error)
            return
        if not _call_soon(loop, deliver, result) and discard is not None:
            discard(result)

    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except RuntimeError as error:  # pthread_create(3) failed
        raise too_many_tasks() from error
    return future


def too_many_tasks() -> ResourceExhausted:
    """Return the error for a host whose limit of tasks is reached (pthread_create(3), clone(2): EAGAIN)."""
    return ResourceExhausted(
        "the host lets the agent start no more threads or processes: raise its limit (TasksMax)",
        reason="TOO_MANY_TASKS",
    )


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[_T], None], argument: _T) -> bool:
    """Call back in the loop's thread; return False if the loop is closed."""
    try:
        loop.call_soon_threadsafe(callback, argument)
    except RuntimeError:
        return False
    return True
