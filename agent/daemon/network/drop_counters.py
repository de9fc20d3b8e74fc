"""Read the kernel's drop counters of running sandboxes; the kernel does not report drops by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from agent.common.errors import AgentError
from agent.common.policy.reasons import Reason
from agent.daemon.network.sandbox_network import SandboxNetwork

_COUNT_EVERY_S = 2.0


async def take(network: SandboxNetwork, sandbox_id: str) -> Mapping[Reason, int]:
    """Return the packets dropped since the last call, by reason; nothing for a sandbox that is removed meanwhile."""
    try:
        return await network.take_drops(sandbox_id)
    except AgentError:
        return {}


async def keep_counting(
    network: SandboxNetwork,
    running: Callable[[], Iterable[str]],
    add: Callable[[str, Mapping[Reason, int]], None],
) -> None:
    """Pass the drops of all running sandboxes to `add` every 2 s, for ever.

    :param running: returns the ids of the running sandboxes.
    :raises ExceptionGroup: unexpected errors of some sandboxes; all others were counted.
    """
    while True:
        await asyncio.sleep(_COUNT_EVERY_S)
        failures = []
        for sandbox_id in list(running()):
            try:
                add(sandbox_id, await take(network, sandbox_id))
            except Exception as error:  # noqa: BLE001  raised below
                failures.append(error)
        if failures:
            raise ExceptionGroup("drops cannot be counted", failures)
