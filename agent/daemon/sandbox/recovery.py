"""What a starting agent does with what an earlier one left: adopts what lives, removes what was half done or unknown.

Sandboxes are settled side by side, since each may wait for its guest.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from pathlib import Path

from agent.common.errors import AgentError
from agent.common.model import State, is_sandbox_id
from agent.common.telemetry import RECONCILED, log
from agent.daemon.sandbox.lifecycle import expiry
from agent.daemon.sandbox.machine import machine, resources
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.service import Manager
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.store import Store

_AT_ONCE = 16
_KEPT = frozenset({"adopted", "suspended", "ended before"})


async def reconcile(host: HostServices, manager: Manager, store: Store, records: list[Record]) -> None:
    """Brings host and records into agreement. Never fails for one sandbox's sake; counts are metrics and log."""
    room = asyncio.Semaphore(_AT_ONCE)

    async def settle(sandbox_id: str, work: Awaitable[str]) -> str:
        async with room:
            try:
                return await work
            except AgentError as error:
                log.error("cannot settle what an earlier agent left", sandbox_id=sandbox_id, error=error.message)
                return "failed"

    orphans = sorted(_found(host) - {record.id for record in records})
    kinds = await asyncio.gather(
        *(settle(record.id, _settle(host, manager, store, record)) for record in records),
        *(settle(sandbox_id, _remove_orphan(host, sandbox_id)) for sandbox_id in orphans),
    )
    counts = Counter(kinds)
    for kind, count in counts.items():
        RECONCILED.labels(kind).inc(count)
    if counts:
        log.info("reconciled", **counts)


async def _remove_orphan(host: HostServices, sandbox_id: str) -> str:
    await resources.remove(host, sandbox_id)
    await host.network.release(sandbox_id)
    return "orphaned"


async def _settle(host: HostServices, manager: Manager, store: Store, record: Record) -> str:
    """Returns what became of a recorded sandbox; one that is gone loses its record only after its resources."""
    before = record.copy()
    if store.rebooted:
        expiry.after_reboot(record)
    kind = await _settle_by_state(host, manager, store, record)
    if kind in _KEPT and record != before:  # the settings or the clock of this boot have changed it
        await store.put(record)
    return kind


async def _settle_by_state(host: HostServices, manager: Manager, store: Store, record: Record) -> str:
    await asyncio.to_thread(resources.remove_tree, host.paths.forks(record.id))
    if record.state in (State.RUNNING, State.PAUSED):
        # Of a resume that an agent did not live to finish: the disk has gone on since.
        await asyncio.to_thread(resources.remove_tree, host.paths.memory(record.id))
        adopted = await machine.adopt(host, record)
        if adopted is not None:
            manager.adopt(record, adopted)
            return "adopted"
        return await _lose(host, manager, store, record, "its VM ended while no agent ran")
    if record.state is State.SUSPENDED:
        await resources.remove_volatile(host, record.id)  # of a resume that an agent did not live to see
        if host.paths.memory(record.id).is_dir():
            manager.keep_suspended(record)
            return "suspended"
        await resources.remove(host, record.id)
        return await _lose(host, manager, store, record, "its saved memory is gone")
    await _end(host, record)
    await host.network.release(record.id)
    if record.state in (State.LOST, State.FAILED):
        manager.keep_ended(record)
        return "ended before"
    await store.delete(record.id)
    return "ended"


async def _lose(host: HostServices, manager: Manager, store: Store, record: Record, why: str) -> str:
    await host.network.release(record.id)
    await manager.lose(record, "the node was restarted" if store.rebooted else why)
    return "lost"


async def _end(host: HostServices, record: Record) -> None:
    """Removes a sandbox that was never to run on: it was being made, had failed, or was being deleted."""
    async with AsyncExitStack() as stack:
        stack.push_async_callback(resources.remove, host, record.id)
        vm = await host.driver.adopt(record.id, host.paths.sandbox_run(record.id), record.token)
        if vm is not None:
            await vm.stop()


def _found(host: HostServices) -> set[str]:
    """Returns the ids of all sandboxes that have a directory of this agent; namespaces alone may be another agent's."""
    return _names(host.paths.sandboxes_run) | _names(host.paths.sandboxes_state)


def _names(directory: Path) -> set[str]:
    if not directory.exists():
        return set()
    return {entry.name for entry in directory.iterdir() if is_sandbox_id(entry.name)}
