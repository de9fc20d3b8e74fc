"""All sandboxes of this node, and the only module's class that the API knows: see `Registry` for what there is,
`Lifecycle` for creates and deletes, `Standing` for pauses and forks; here are changes, ends, and what a new agent takes
over.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping

from agent.common.background import Supervisor
from agent.common.config.settings import Settings
from agent.common.errors import AgentError, InvalidState
from agent.common.model import Lifetime, State
from agent.common.telemetry import log
from agent.daemon.sandbox.capacity.drain import Drain
from agent.daemon.sandbox.capacity.node import Node
from agent.daemon.sandbox.lifecycle import expiry, policy_change
from agent.daemon.sandbox.lifecycle.entry import Entry
from agent.daemon.sandbox.lifecycle.pause import Standing
from agent.daemon.sandbox.lifecycle.policy_change import PolicyChange
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.state.events import EventType
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.store import Store
from agent.daemon.sandbox.state.validation import changed_labels, check_expire_time, check_lease_change
from agent.daemon.sandbox.templates.catalog import Templates
from agent.daemon.sandbox.templates.prewarm import keep_prepared
from agent.daemon.storage.images import ImageStore

_NO_CHANGE = PolicyChange()
_LIVING = frozenset({State.RUNNING, State.PAUSED, State.SUSPENDED})


class Manager(Standing):
    """The sandboxes of this node."""

    def __init__(
        self,
        machines: HostServices,
        images: ImageStore,
        node: Node,
        store: Store,
        templates: Templates | None = None,
        *,
        supervisor: Supervisor,
    ) -> None:
        super().__init__(machines, images, node, store, templates)
        self.drain = Drain(node, store, lambda: len(self._entries), self._evict, supervisor)

    def reconfigure(self, settings: Settings) -> None:
        """Takes other limits and labels of the node from now on; sandboxes that are there stay."""
        self.node.reconfigure(settings)
        self.admission.reconfigure(settings.node)

    async def _evict(self) -> None:
        """Deletes all sandboxes; one that cannot be deleted is logged."""
        doomed = list(self._entries.values())
        await asyncio.gather(*(self._start_delete(entry, "evicted") for entry in doomed), return_exceptions=True)

    # -- changing ------------------------------------------------------------------------------------------------------

    async def update(
        self, sandbox_id: str, *, expire_time: float | None, clear_expire_time: bool,
        set_labels: Mapping[str, str], remove_labels: Iterable[str], policy: PolicyChange = _NO_CHANGE,
        end_lease: bool = False,
    ) -> Record:  # fmt: skip
        """Changes expire time, labels, network policy and secrets; what the policy no longer allows has ended then.

        :raises NotFound:
        :raises InvalidSpec:
        :raises InvalidState: it has a lease, or is being deleted, or its policy is to be changed and it does not run.
        """
        entry = self._entry(sandbox_id)
        new_labels, old_labels = dict(set_labels), tuple(remove_labels)

        def edit(draft: Record) -> None:
            leased = draft.spec.lifetime.lease_s is not None
            check_lease_change(expire_time, leased=leased, clear=clear_expire_time, end_lease=end_lease)
            check_expire_time(expire_time, time.time())
            draft.labels = changed_labels(draft.labels, new_labels, old_labels)
            if end_lease:
                draft.spec = dataclasses.replace(draft.spec, lifetime=Lifetime(idle_s=draft.spec.lifetime.idle_s))
            if expire_time is not None or clear_expire_time:
                expiry.live_until(draft, expire_time)

        # Labels and times can change during a pause or fork, however long it takes; a policy cannot.
        await self._operations.run(entry, "update", lambda: self._update(entry, edit, policy), exclusive=bool(policy))
        return entry.record.copy()

    async def _update(self, entry: Entry, edit: Callable[[Record], None], policy: PolicyChange) -> None:
        if policy:
            edit(entry.record.copy())  # what it refuses, it refuses before the network changes
            channel = self.running(entry.record.id).channel
            async with policy_change.in_force(self._host, self._store, entry.record, policy, channel):
                await self._store.change(entry.record, edit)
        else:
            await self._store.change(entry.record, edit)
        self._publish(EventType.UPDATED, entry)

    async def renew_lease(self, sandbox_id: str) -> float:
        """Renews a lease and returns when it lapses. :raises NotFound: :raises InvalidState: it has none."""
        entry = self._entry(sandbox_id)

        def renew(draft: Record) -> None:
            if draft.spec.lifetime.lease_s is None:
                raise InvalidState(f"sandbox {sandbox_id} was created without a lease", reason="NO_LEASE")
            expiry.live_for(draft, draft.spec.lifetime.lease_s)

        # Not exclusive: a pause or fork that takes longer than the lease must not let it lapse.
        await self._operations.run(
            entry, "lease renewal", lambda: self._store.change(entry.record, renew), exclusive=False
        )
        assert entry.record.expire_time is not None
        return entry.record.expire_time

    async def keep_lifetimes(self) -> None:
        """Ends sandboxes when it is time, until it is cancelled."""

        async def moved(entry: Entry) -> None:
            self._publish(EventType.UPDATED, entry)
            await self._store.put(entry.record)

        await expiry.keep(self._entries.values, self._start_delete, moved)

    # -- starting and stopping -----------------------------------------------------------------------------------------

    async def prepare_templates(self) -> None:
        """Keeps the templates of the configured sizes ready until it is cancelled; see `keep_prepared`."""
        if self.templates is not None:
            await keep_prepared(self._host.settings, self.images, self.templates)

    def adopt(self, record: Record, adopted: Machine) -> None:
        """Takes over a sandbox that an earlier agent left running."""
        entry = self._take_over(record, adopted)
        self._host.volumes.attach(record)
        if record.template and self.templates is not None:
            entry.cleanup_stack.enter_context(self.templates.pin(record.template))
        self._start_watch(entry)

    def keep_suspended(self, record: Record) -> None:
        """Takes over a sandbox that is on the disk alone."""
        self._take_over(record, None).needs_cleanup = True
        self._host.volumes.attach(record)

    async def lose(self, record: Record, why: str) -> None:
        """Keeps what an earlier agent left and what does not live any more, so that its owner learns why.

        It has nothing on the host, and is deleted after a while.
        """
        record.error, record.token, record.slot, record.uid = why, {}, None, None
        record.move(State.LOST)
        retention_s = self._host.settings.sandbox.lost_retention_s
        if record.expire_time is None or record.expire_time > time.time() + retention_s:
            expiry.live_for(record, retention_s)
        try:
            await self._store.put(record)
        except AgentError as error:  # the next agent finds it lost once more
            log.error("cannot store that a sandbox is lost", sandbox_id=record.id, error=error.message)
        self._take_over(record, None)
        log.warning("sandbox lost", sandbox_id=record.id, why=why)

    def keep_ended(self, record: Record) -> None:
        """Goes on to keep what was lost or failed under an earlier agent."""
        self._take_over(record, None)

    def _take_over(self, record: Record, adopted: Machine | None) -> Entry:
        self._host.uids.reserve_existing(record.uid)
        entry = Entry(record, adopted)
        self._add(entry)
        self._publish(EventType.UPDATED, entry)
        return entry

    async def stop(self, *, keep: bool) -> None:
        """Ends the manager: deletes every sandbox, or leaves those that run to the next agent."""
        await self.drain.aclose()
        self.node.set_draining("the agent is stopping")
        pending = [entry for entry in self._entries.values() if not keep or entry.record.state not in _LIVING]
        # One that cannot be deleted is logged, and settled by the next agent.
        await asyncio.gather(*(self._start_delete(entry, "agent stopped") for entry in pending), return_exceptions=True)
        if self.templates is not None:
            await self.templates.aclose()
        left, self._entries = self._entries, {}
        for entry in left.values():
            await self._operations.cancel(entry)  # which undoes what is half done, or the next agent would find it
            await self._stop_watch(entry)
            if entry.machine is not None:
                await entry.machine.detach()
