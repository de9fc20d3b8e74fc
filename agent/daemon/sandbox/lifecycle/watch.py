"""Monitor of running sandboxes: notices the end of a VM or of its link, and marks the sandbox FAILED."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from agent.common.aio import cancel_and_wait
from agent.common.config.daemon import SandboxSettings
from agent.common.errors import AgentError, VmmError
from agent.common.model import State
from agent.common.telemetry import VMM_OUT_OF_MEMORY, log
from agent.daemon.host.cgroup import Cgroups
from agent.daemon.sandbox.lifecycle.registry import SandboxEntry, SandboxRegistry
from agent.daemon.sandbox.machine import guest_setup
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.state.events import EventType
from agent.daemon.sandbox.state.store import Store
from guest.oom import OomWatcher


class Monitor:
    """Watches over the VM and the link of each running sandbox, and over the VM of each paused one."""

    def __init__(self, settings: SandboxSettings, cgroups: Cgroups, store: Store, registry: SandboxRegistry) -> None:
        self._settings = settings
        self._cgroups = cgroups
        self._store = store
        self._registry = registry
        self._oom = OomWatcher()

    def start(self, entry: SandboxEntry) -> None:
        """Start to monitor a sandbox that has a machine."""
        entry.operations.start_monitor(lambda: self._watch(entry))

    async def _watch(self, entry: SandboxEntry) -> None:
        assert entry.machine is not None
        if entry.record.state is State.PAUSED:
            why: AgentError = guest_setup.vmm_ended(await entry.machine.vm.wait())
        else:
            why = await _until_lost(entry.machine, entry.record.id, self._settings.relink_timeout_s)
        await self.fail(entry, self._explain(entry, why))

    def _explain(self, entry: SandboxEntry, why: AgentError) -> AgentError:
        """Return `why`, or an error that says that the kernel's OOM killer ended the VMM."""
        assert entry.machine is not None
        # The kernel log is read in any case: what is not consumed now would be attributed to the next VMM that ends.
        logged = self._oom.killed(entry.machine.vm.pid)
        if why.reason != "VMM_ENDED" or not (logged or self._cgroups.out_of_memory(entry.record.id)):
            return why
        VMM_OUT_OF_MEMORY.inc()
        return VmmError(
            "the host ended the sandbox's virtual machine for lack of memory: raise cgroups.memory_headroom_bytes or "
            f"node.reserved_memory_bytes ({why.message})",
            reason="VMM_OUT_OF_MEMORY",
        )

    async def fail(self, entry: SandboxEntry, error: AgentError) -> None:
        """Stop the VM and mark the sandbox FAILED, with the end of its console; its disk stays until the delete."""
        assert entry.machine is not None
        await entry.machine.vm.stop()
        entry.record.error = f"{error.message}{guest_setup.console_note(entry.machine.vm)}"
        entry.record.move(State.FAILED)
        log.error("sandbox failed", sandbox_id=entry.record.id, error=error.message)
        with contextlib.suppress(AgentError):
            await self._store.put(entry.record)
        self._registry.publish(EventType.UPDATED, entry)


async def _until_lost(machine: Machine, sandbox_id: str, relink_timeout_s: float) -> AgentError:
    """Return an error once the VM has ended, or the link was lost and could not be dialled again."""
    ended = asyncio.create_task(machine.vm.wait())
    try:
        while True:
            waited: set[asyncio.Future[Any]] = {ended, machine.channel.lost}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return guest_setup.vmm_ended(ended.result())
            log.warning("link lost", sandbox_id=sandbox_id, reason=machine.channel.lost.result().message)
            try:
                await machine.relink(relink_timeout_s)
            except AgentError as error:
                return error
    finally:
        await cancel_and_wait(ended)
