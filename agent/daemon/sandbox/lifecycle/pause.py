"""Pause a sandbox in memory or suspend it to disk, and resume it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from agent.common.aio import run_to_completion
from agent.common.errors import AgentError
from agent.common.model import State
from agent.common.telemetry import step
from agent.daemon.sandbox.capacity.admission import Admission
from agent.daemon.sandbox.lifecycle.registry import SandboxEntry, SandboxRegistry
from agent.daemon.sandbox.lifecycle.transition import Transitions
from agent.daemon.sandbox.lifecycle.watch import Monitor
from agent.daemon.sandbox.machine import resources, snapshot
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.state.record import Record
from agent.daemon.storage.images import Image, ImageStore


class Pauser:
    """Pauses, suspends and resumes sandboxes."""

    def __init__(
        self,
        host: HostServices,
        images: ImageStore,
        registry: SandboxRegistry,
        admission: Admission,
        monitor: Monitor,
        transitions: Transitions,
    ) -> None:
        self._host = host
        self._images = images
        self._registry = registry
        self._admission = admission
        self._monitor = monitor
        self._transitions = transitions
        self._relink_timeout_s = host.settings.sandbox.relink_timeout_s

    async def pause(self, sandbox_id: str, *, to_disk: bool) -> Record:
        """Pause a sandbox, or suspend it to disk and free its memory. Idempotent.

        :raises NotFound: the node has no such sandbox.
        :raises InvalidState: the sandbox is neither running nor paused.
        :raises AgentError: a step failed; the sandbox is as it was.
        """
        return await self._run(sandbox_id, "pause", self._suspend if to_disk else self._pause)

    async def resume(self, sandbox_id: str) -> Record:
        """Resume a paused or suspended sandbox. Idempotent.

        :raises NotFound: the node has no such sandbox.
        :raises InvalidState: the sandbox has failed, or is being deleted.
        :raises ResourceExhausted: the node has no room for a suspended sandbox.
        :raises AgentError: a step failed; a suspended sandbox stays suspended.
        """
        return await self._run(sandbox_id, "resume", self._resume)

    async def _run(
        self, sandbox_id: str, name: str, work: Callable[[SandboxEntry], Coroutine[Any, Any, None]]
    ) -> Record:
        entry = self._registry.entry(sandbox_id)
        await entry.operations.run(name, lambda: work(entry))
        return entry.record.copy()

    async def _pause(self, entry: SandboxEntry) -> None:
        if entry.record.state in (State.PAUSED, State.SUSPENDED):
            return
        machine = self._registry.running(entry.record.id)
        await _sync_volumes(entry, machine)
        async with self._transitions.unmonitored(entry, machine):
            with step("pause.stop"):
                await machine.pause()
            with step("pause.record"):
                await self._transitions.move(entry, State.PAUSED)

    async def _suspend(self, entry: SandboxEntry) -> None:
        record = entry.record
        if record.state is State.SUSPENDED:
            return
        machine = self._transitions.pausable(entry)
        await _sync_volumes(entry, machine)
        async with self._transitions.unmonitored(entry, machine):
            saved = self._host.paths.memory(record.id)
            await snapshot.save(machine, saved)
            try:
                with step("pause.record"):
                    await self._transitions.move(
                        entry, State.SUSPENDED, lambda draft: draft.token.clear(), durable=True
                    )
            finally:
                if entry.record.state is not State.SUSPENDED:  # a write may succeed although it is cancelled
                    await run_to_completion(asyncio.to_thread(resources.remove_tree, saved))
        entry.machine, entry.needs_cleanup = None, True
        entry.cleanup_stack.close()
        with step("pause.machine"):
            await machine.release()

    async def _resume(self, entry: SandboxEntry) -> None:
        record = entry.record
        if record.state is State.RUNNING:
            return
        if record.state is State.PAUSED:
            assert entry.machine is not None
            await entry.operations.stop_monitor()
            await self._resume_guest(entry, entry.machine)
        elif record.state is State.SUSPENDED:
            saved = self._host.paths.memory(record.id)
            self._admission.check([record.spec])
            image = self._images.get_build(record.spec.image, record.image_digest)
            entry.needs_cleanup = True
            machine = entry.machine = await self._restore(entry, image, saved)
            entry.needs_cleanup = False
            await self._resume_guest(entry, machine)
            await self._transitions.note_cpus_stopped(entry, stopped=False)
            with step("resume.saved"):
                await run_to_completion(asyncio.to_thread(resources.remove_tree, saved))
        else:
            self._registry.running(record.id)  # raises an error that says why not

    async def _restore(self, entry: SandboxEntry, image: Image, saved: Path) -> Machine:
        """Return the machine of a suspended sandbox, its CPUs stopped and its record RUNNING; undo all on failure."""
        record = entry.record
        of_machine = record.token, record.slot, record.rules  # set by `snapshot.restore`
        try:
            machine = await snapshot.restore(self._host, record, image, saved)
            try:
                with step("resume.record"):
                    # The next agent resumes the CPUs if this one dies first.
                    await self._transitions.move(
                        entry, State.RUNNING, lambda draft: setattr(draft, "maybe_paused", True), durable=True
                    )
            except BaseException:
                if record.state is State.SUSPENDED:
                    await machine.release()
                else:  # the write succeeded before its cancellation: the record needs this machine
                    entry.machine, entry.needs_cleanup = machine, False
                raise
        except BaseException:
            if record.state is State.SUSPENDED:
                record.token, record.slot, record.rules = of_machine
            raise
        return machine

    async def _resume_guest(self, entry: SandboxEntry, machine: Machine) -> None:
        """Start the CPUs, refresh the guest, and restart the monitor; a guest that does not answer has failed."""
        try:
            with step("resume.guest"):
                await machine.resume(self._relink_timeout_s)
        except AgentError as error:
            await self._monitor.fail(entry, error)
            raise
        if entry.record.state is not State.RUNNING:
            with step("resume.record"):
                await self._transitions.move(entry, State.RUNNING)
        self._monitor.start(entry)


async def _sync_volumes(entry: SandboxEntry, machine: Machine) -> None:
    """Flush the guest's writes to its volumes: these outlive the sandbox, whatever becomes of it."""
    if entry.record.spec.root or entry.record.spec.volumes:
        await machine.sync()
