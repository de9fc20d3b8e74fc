"""Delete a sandbox: end its work, remove its host resources, and its record last."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from agent.common.errors import AgentError
from agent.common.model import State
from agent.common.telemetry import DELETES, log, step
from agent.daemon.sandbox.lifecycle.registry import SandboxEntry, SandboxRegistry
from agent.daemon.sandbox.machine import resources
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.state.events import EventType
from agent.daemon.sandbox.state.store import Store


class Deleter:
    """Deletes sandboxes, and removes what a failed create left."""

    def __init__(self, host: HostServices, store: Store, registry: SandboxRegistry) -> None:
        self._host = host
        self._store = store
        self._registry = registry

    async def delete(self, entry: SandboxEntry, reason: str) -> None:
        """Delete a sandbox and return when nothing of it is left; a delete in progress is awaited.

        Cancelling the caller does not stop the delete.

        :raises AgentError: a resource could not be removed; the next delete tries again.
        """
        await asyncio.shield(self.start(entry, reason))

    async def delete_all(self, entries: Iterable[SandboxEntry], reason: str) -> None:
        """Delete sandboxes side by side; failures are logged only."""
        await asyncio.gather(*(self.start(entry, reason) for entry in entries), return_exceptions=True)

    def start(self, entry: SandboxEntry, reason: str) -> asyncio.Task[None]:
        """Return the task that deletes a sandbox, started unless there is one.

        :param reason: label of metrics, and reason of the event: one of a small fixed set.
        """
        return entry.operations.start_delete(lambda: self._delete(entry, reason))

    async def _delete(self, entry: SandboxEntry, reason: str) -> None:
        with step("delete"):
            await entry.operations.cancel()
            entry.record.state = State.DELETING
            self._registry.publish(EventType.UPDATED, entry, reason)
            try:
                with step("delete.intent"), contextlib.suppress(AgentError):  # a full disk must not prevent a delete
                    await self._store.put(entry.record)
                await self._remove(entry, reason)
            except BaseException as error:
                log.error("delete failed", sandbox_id=entry.record.id, error=str(error))
                raise
        DELETES.labels(reason).inc()
        log.info("sandbox deleted", sandbox_id=entry.record.id, reason=reason)

    async def discard(self, entry: SandboxEntry, reason: str) -> None:
        """Remove what a failed create left, from the task of that create; a delete meanwhile waits for the removal.

        :raises AgentError: a resource could not be removed; the next delete tries again.
        """
        await asyncio.shield(entry.operations.start_delete(lambda: self._remove(entry, reason)))

    async def _remove(self, entry: SandboxEntry, reason: str) -> None:
        """Remove the host resources of a sandbox, then its record: recovery finishes the work after a crash."""
        if entry.machine is not None:
            if (spec := entry.record.spec).root or spec.volumes:
                await entry.machine.sync()
            machine, entry.machine = entry.machine, None
            entry.needs_cleanup = True  # if the next step fails
            with step("delete.machine"):
                await machine.aclose()
        elif entry.needs_cleanup:
            with step("delete.machine"):
                await resources.remove(self._host, entry.record.id)
        entry.cleanup_stack.close()
        with step("delete.secrets"):
            await self._host.secrets.release(entry.record.id)
        self._host.volumes.detach(entry.record.id)
        with step("delete.record"):
            await self._store.delete(entry.record.id)
        self._registry.remove(entry)
        self._host.uids.release(entry.record.uid)
        entry.record.state = State.DELETED
        self._registry.publish(EventType.DELETED, entry, reason)
