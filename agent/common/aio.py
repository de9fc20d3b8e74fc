"""Awaiting work that cannot be undone half-way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import TypeVar

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
