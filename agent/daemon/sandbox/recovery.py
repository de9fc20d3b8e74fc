"""Recovery at start: adopt the sandboxes that an earlier agent left running, remove what is half done or unknown.

Sandboxes are recovered concurrently, since each may wait for its guest.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from agent.common.errors import AgentError
from agent.common.model import State, is_sandbox_id
from agent.common.telemetry import RECOVERED, log
from agent.daemon.sandbox.lifecycle import expiry
from agent.daemon.sandbox.lifecycle.registry import SandboxEntry, SandboxRegistry
from agent.daemon.sandbox.lifecycle.watch import Monitor
from agent.daemon.sandbox.machine import machine, resources
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.state.events import EventType
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.store import Store
from agent.daemon.sandbox.templates.catalog import Templates

_CONCURRENCY = 16
_KEPT = frozenset({"adopted", "suspended", "ended before"})


class Recovery:
    """Brings host and records into agreement, and fills the registry.

    :param templates: None: no sandbox uses a template.
    """

    def __init__(
        self, host: HostServices, store: Store, registry: SandboxRegistry, monitor: Monitor, templates: Templates | None
    ) -> None:
        self._host = host
        self._store = store
        self._registry = registry
        self._monitor = monitor
        self._templates = templates

    async def run(self, records: Sequence[Record]) -> None:
        """Recover all sandboxes. The failure of one is logged and does not affect the others; outcomes are counted."""
        limit = asyncio.Semaphore(_CONCURRENCY)

        async def recover(sandbox_id: str, work: Awaitable[str]) -> str:
            async with limit:
                try:
                    return await work
                except AgentError as error:
                    log.error("cannot recover a sandbox", sandbox_id=sandbox_id, error=error.message)
                    return "failed"

        orphans = sorted(_found_on_host(self._host) - {record.id for record in records})
        outcomes = await asyncio.gather(
            *(recover(record.id, self._recover(record)) for record in records),
            *(recover(sandbox_id, self._remove_orphan(sandbox_id)) for sandbox_id in orphans),
        )
        counts = Counter(outcomes)
        for outcome, count in counts.items():
            RECOVERED.labels(outcome).inc(count)
        if counts:
            log.info("recovered", **counts)

    async def _remove_orphan(self, sandbox_id: str) -> str:
        await resources.remove(self._host, sandbox_id)
        await self._host.secrets.release(sandbox_id)
        return "orphaned"

    async def _recover(self, record: Record) -> str:
        """Recover one sandbox and return the outcome, a label of `RECOVERED`.

        The record of a sandbox that ended is removed only after its resources.
        """
        before = record.copy()
        if self._store.rebooted:
            expiry.after_reboot(record)
        outcome = await self._recover_by_state(record)
        if outcome in _KEPT and record != before:  # changed by this agent's settings, or the clock of this boot
            await self._store.put(record)
        return outcome

    async def _recover_by_state(self, record: Record) -> str:
        host = self._host
        await asyncio.to_thread(resources.remove_tree, host.paths.forks(record.id))
        if record.state in (State.RUNNING, State.PAUSED):
            # Left by an interrupted resume: useless, since the VM has written to its disk since the save.
            await asyncio.to_thread(resources.remove_tree, host.paths.memory(record.id))
            adopted = await machine.adopt(host, record)
            if adopted is not None:
                self._adopt(record, adopted)
                return "adopted"
            return await self._lose(record, "its VM ended while no agent ran")
        if record.state is State.SUSPENDED:
            await resources.remove_volatile(host, record.id)  # left by an interrupted resume
            if host.paths.memory(record.id).is_dir():
                self._register(record, None).needs_cleanup = True
                host.volumes.attach(record.id, record.volume_ids)
                return "suspended"
            await resources.remove(host, record.id)
            return await self._lose(record, "its saved memory is gone")
        await self._end(record)
        await host.secrets.release(record.id)
        if record.state in (State.LOST, State.FAILED):
            self._register(record, None)
            return "ended before"
        await self._store.delete(record.id)
        return "ended"

    def _adopt(self, record: Record, adopted: Machine) -> None:
        entry = self._register(record, adopted)
        self._host.volumes.attach(record.id, record.volume_ids)
        if record.template and self._templates is not None:
            entry.cleanup_stack.enter_context(self._templates.pin(record.template))
        self._monitor.start(entry)

    async def _lose(self, record: Record, why: str) -> str:
        """Keep a sandbox without any host resources as LOST for a while, so that its owner can read the reason."""
        await self._host.secrets.release(record.id)
        why = "the node was restarted" if self._store.rebooted else why
        record.error, record.token, record.slot, record.uid = why, {}, None, None
        record.move(State.LOST)
        retention_s = self._host.settings.sandbox.lost_retention_s
        if record.expire_time is None or record.expire_time > time.time() + retention_s:
            expiry.live_for(record, retention_s)
        try:
            await self._store.put(record)
        except AgentError as error:  # the next agent finds the sandbox lost again
            log.error("cannot store that a sandbox is lost", sandbox_id=record.id, error=error.message)
        self._register(record, None)
        log.warning("sandbox lost", sandbox_id=record.id, why=why)
        return "lost"

    async def _end(self, record: Record) -> None:
        """Stop the VM and remove the resources of a sandbox that was being created or deleted, or had failed."""
        host = self._host
        async with AsyncExitStack() as stack:
            stack.push_async_callback(resources.remove, host, record.id)
            vm = await host.driver.adopt(record.id, host.paths.sandbox_run(record.id), record.token)
            if vm is not None:
                await vm.stop()

    def _register(self, record: Record, adopted: Machine | None) -> SandboxEntry:
        self._host.uids.reserve_existing(record.uid)
        entry = SandboxEntry(record, adopted)
        self._registry.add(entry)
        self._registry.publish(EventType.UPDATED, entry)
        return entry


def _found_on_host(host: HostServices) -> set[str]:
    """Return the ids of all sandboxes with a directory of this agent; a namespace alone may be another agent's."""
    return _sandbox_ids(host.paths.sandboxes_run) | _sandbox_ids(host.paths.sandboxes_state)


def _sandbox_ids(directory: Path) -> set[str]:
    if not directory.exists():
        return set()
    return {path.name for path in directory.iterdir() if is_sandbox_id(path.name)}
