"""Reads what the kernel's rules dropped: they tell nobody by themselves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from agent.common.errors import AgentError
from agent.daemon.sandbox.machine.host_services import Network
from agent.daemon.sandbox.state.record import Record

_COUNT_EVERY_S = 2.0


async def count(network: Network, record: Record) -> None:
    """Adds what was dropped since the last look to the record's denials; of a sandbox that goes meanwhile, nothing."""
    with contextlib.suppress(AgentError):
        await network.count_drops(record)


async def keep_counting(network: Network, running: Callable[[], Iterable[Record]]) -> None:
    """Count the drops of all running sandboxes every 2 s, for ever.

    :raises ExceptionGroup: unexpected errors of some sandboxes; all others were counted.
    """
    while True:
        await asyncio.sleep(_COUNT_EVERY_S)
        failures = []
        for record in list(running()):
            try:
                await count(network, record)
            except Exception as error:  # noqa: BLE001  raised below
                failures.append(error)
        if failures:
            raise ExceptionGroup("drops cannot be counted", failures)
