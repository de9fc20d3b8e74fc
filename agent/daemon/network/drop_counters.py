"""Reads what the kernel's rules dropped: they tell nobody by themselves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from agent.common.errors import AgentError
from agent.daemon.sandbox.machine.resources import Network
from agent.daemon.sandbox.state.record import Record

_COUNT_EVERY_S = 2.0


async def count(network: Network, record: Record) -> None:
    """Adds what was dropped since the last look to the record's denials; of a sandbox that goes meanwhile, nothing."""
    with contextlib.suppress(AgentError):
        await network.count_drops(record)


async def keep_counting(network: Network, running: Callable[[], Iterable[Record]]) -> None:
    """Looks at all running sandboxes, for ever."""
    while True:
        await asyncio.sleep(_COUNT_EVERY_S)
        for record in list(running()):
            await count(network, record)
