"""Update a sandbox: labels, expire time, lease, network policy and secrets."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping

from agent.common.errors import InvalidState
from agent.common.model import Lifetime
from agent.daemon.sandbox.lifecycle import expiry, policy_change
from agent.daemon.sandbox.lifecycle.policy_change import PolicyChange
from agent.daemon.sandbox.lifecycle.registry import SandboxEntry, SandboxRegistry
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.state.events import EventType
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.store import Store
from agent.daemon.sandbox.state.validation import changed_labels, check_expire_time, check_lease_change

_NO_CHANGE = PolicyChange()


class Updater:
    """Changes records of sandboxes, and the policy in force. A change is stored first, or undone."""

    def __init__(self, host: HostServices, store: Store, registry: SandboxRegistry) -> None:
        self._host = host
        self._store = store
        self._registry = registry

    async def update(
        self, sandbox_id: str, *, expire_time: float | None, clear_expire_time: bool,
        set_labels: Mapping[str, str], remove_labels: Iterable[str], policy: PolicyChange = _NO_CHANGE,
        end_lease: bool = False,
    ) -> Record:  # fmt: skip
        """Update a sandbox; connections that the new policy forbids have ended when this returns.

        Cancelling the caller does not stop the update.

        :param expire_time: seconds since 1970; None: unchanged.
        :param end_lease: replace the lease by `expire_time`.
        :raises NotFound: the node has no such sandbox, or it has no such secret to remove.
        :raises InvalidSpec: a value is out of range.
        :raises InvalidState: the sandbox has a lease or is being deleted, or has a new policy but is not running.
        :raises AgentError: a step failed; the sandbox is as it was.
        """
        entry = self._registry.entry(sandbox_id)
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
        await entry.operations.run("update", lambda: self._update(entry, edit, policy), exclusive=bool(policy))
        return entry.record.copy()

    async def _update(self, entry: SandboxEntry, edit: Callable[[Record], None], policy: PolicyChange) -> None:
        if policy:
            edit(entry.record.copy())  # raises before the network changes
            channel = self._registry.running(entry.record.id).channel
            async with policy_change.in_force(self._host, self._store, entry.record, policy, channel):
                await self._store.change(entry.record, edit)
        else:
            await self._store.change(entry.record, edit)
        self._registry.publish(EventType.UPDATED, entry)

    async def renew_lease(self, sandbox_id: str) -> float:
        """Renew the lease of a sandbox and return when it lapses, in seconds since 1970.

        :raises NotFound: the node has no such sandbox.
        :raises InvalidState: the sandbox has no lease, or is being deleted.
        :raises HostError: the write failed; the lease lapses as before.
        """
        entry = self._registry.entry(sandbox_id)

        def renew(draft: Record) -> None:
            if draft.spec.lifetime.lease_s is None:
                raise InvalidState(f"sandbox {sandbox_id} was created without a lease", reason="NO_LEASE")
            expiry.live_for(draft, draft.spec.lifetime.lease_s)

        # Not exclusive: the lease must not lapse during a pause or fork that takes longer.
        await entry.operations.run(
            "lease renewal", lambda: self._store.change(entry.record, renew), exclusive=False
        )  # fmt: skip
        assert entry.record.expire_time is not None
        return entry.record.expire_time
