"""Transitions between running and paused: stored first, then applied in memory, with the monitor stopped meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from agent.common.errors import AgentError
from agent.common.model import State
from agent.common.telemetry import log, step
from agent.daemon.sandbox.lifecycle.registry import SandboxEntry, SandboxRegistry
from agent.daemon.sandbox.lifecycle.watch import Monitor
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.state.events import EventType
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.store import Store


class Transitions:
    """What pause, resume and fork share. All methods are called with the lock of the sandbox held."""

    def __init__(self, store: Store, registry: SandboxRegistry, monitor: Monitor, relink_timeout_s: float) -> None:
        self._store = store
        self._registry = registry
        self._monitor = monitor
        self._relink_timeout_s = relink_timeout_s

    async def move(
        self,
        entry: SandboxEntry,
        state: State,
        also: Callable[[Record], None] = lambda _: None,
        *,
        durable: bool = False,
    ) -> None:
        """Store a new state, then apply it in memory and publish it.

        :param also: edits further fields of the record, in the same write.
        :param durable: the write outlives a crash of the host.
        :raises InvalidState: there is no such transition.
        :raises HostError: the write failed; nothing has changed.
        """

        def edit(draft: Record) -> None:
            draft.move(state)
            also(draft)

        await self._store.change(entry.record, edit, durable=durable)
        self._registry.publish(EventType.UPDATED, entry)
        log.info("sandbox state changed", sandbox_id=entry.record.id, state=state.value)

    def pausable(self, entry: SandboxEntry) -> Machine:
        """Return the machine of a running or paused sandbox.

        :raises InvalidState: the sandbox is neither.
        """
        if entry.record.state is State.PAUSED and entry.machine is not None:
            return entry.machine
        return self._registry.running(entry.record.id)

    @contextlib.asynccontextmanager
    async def unmonitored(self, entry: SandboxEntry, machine: Machine) -> AsyncIterator[None]:
        """Suspend monitoring while the VM may be paused; on failure resume a running sandbox's VM.

        The monitor is restarted afterwards, unless the sandbox was suspended or is being deleted.
        """
        await entry.operations.stop_monitor()
        try:
            await self.note_cpus_stopped(entry, stopped=True)
            yield
        except BaseException:
            if not entry.operations.deleting and entry.record.state is State.RUNNING:
                with contextlib.suppress(AgentError):  # the monitor, restarted below, notices a VM that is lost
                    await asyncio.shield(machine.resume(self._relink_timeout_s))
            raise
        finally:
            if not entry.operations.deleting and entry.record.state in (State.RUNNING, State.PAUSED):
                self._monitor.start(entry)
                with contextlib.suppress(AgentError):  # at worst the next agent resumes running CPUs
                    await asyncio.shield(self.note_cpus_stopped(entry, stopped=False))

    async def note_cpus_stopped(self, entry: SandboxEntry, *, stopped: bool) -> None:
        """Store whether the CPUs of a RUNNING sandbox may be stopped, so that the next agent resumes them.

        :raises HostError: the write failed.
        """
        with step("pause.note"):
            await self._store.change(entry.record, lambda draft: setattr(draft, "maybe_paused", stopped))
