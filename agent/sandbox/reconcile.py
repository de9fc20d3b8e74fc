"""What a starting agent does with what an earlier one left: adopts what lives, finishes what was half done, removes the rest."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from agent.errors import AgentError
from agent.model import State, is_sandbox_id
from agent.sandbox import machine
from agent.sandbox.machine import Host
from agent.sandbox.manager import Manager
from agent.sandbox.record import Record
from agent.sandbox.store import Store
from agent.telemetry import RECONCILED, log


async def reconcile(host: Host, manager: Manager, store: Store, records: list[Record]) -> None:
    """Brings the host and the records into agreement. Never fails for one sandbox's sake; counts are metrics and log."""
    counts = {"adopted": 0, "ended": 0, "orphaned": 0, "failed": 0}
    for record in records:
        try:
            kind = await _settle(host, manager, store, record)
        except AgentError as error:
            kind = "failed"
            log.error("cannot settle what an earlier agent left", sandbox_id=record.id, error=error.message)
        counts[kind] += 1
    known = {record.id for record in records}
    for sandbox_id in sorted(_found(host) - known):
        machine.kill_strays(host, sandbox_id)
        async with AsyncExitStack() as stack:
            machine.push_removal(host, sandbox_id, stack)
        counts["orphaned"] += 1
    for kind, count in counts.items():
        RECONCILED.labels(kind).inc(count)
    if any(counts.values()):
        log.info("reconciled", **counts)


async def _settle(host: Host, manager: Manager, store: Store, record: Record) -> str:
    if record.state is State.RUNNING:
        adopted = await machine.adopt(host, record)
        if adopted is not None:
            manager.adopt(record, adopted)
            return "adopted"
    else:
        await _end(host, record)
    await store.delete(record.id)
    return "ended"


async def _end(host: Host, record: Record) -> None:
    """Removes a sandbox that was never to run on: it was being made, had failed, or was being deleted."""
    async with AsyncExitStack() as stack:
        machine.push_removal(host, record.id, stack)
        vm = await host.driver.adopt(record.id, host.paths.sandbox_run(record.id), record.token)
        if vm is not None:
            await vm.stop()
        machine.kill_strays(host, record.id)


def _found(host: Host) -> set[str]:
    """Returns the ids of all sandboxes that have a directory of this agent; namespaces alone may be another agent's."""
    return _names(host.paths.sandboxes_run) | _names(host.paths.sandboxes_state)


def _names(directory: Path) -> set[str]:
    if not directory.exists():
        return set()
    return {entry.name for entry in directory.iterdir() if is_sandbox_id(entry.name)}
