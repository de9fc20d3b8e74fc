"""All sandboxes of this node: create, look up, change, delete. The only module that decides.

Lifecycle work runs in tasks that the manager owns: a caller that leaves does not cancel it. A create that fails leaves
nothing, not even a record; a sandbox that dies after it was RUNNING stays as FAILED, with its last console lines, until
it is deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from types import MappingProxyType

from agent.channel.channel import Channel
from agent.errors import AgentError, AlreadyExists, InvalidSpec, InvalidState, NodeDraining, NotFound
from agent.model import Lifetime, SandboxSpec, State, is_sandbox_id, new_sandbox_id
from agent.rootfs import Image, ImageStore
from agent.sandbox import dialogue, drops, host, policy_change
from agent.sandbox.entry import Entry
from agent.sandbox.events import Denial, Event, Events, EventType
from agent.sandbox.host import Host
from agent.sandbox.machine import Boot, Machine
from agent.sandbox.monitor import until_lost
from agent.sandbox.node import Node, NodeInfo
from agent.sandbox.policy_change import PolicyChange
from agent.sandbox.preparer import keep_prepared
from agent.sandbox.record import Record
from agent.sandbox.spec import changed_labels, check_expire_time, check_lease_change, same_request
from agent.sandbox.store import Store
from agent.sandbox.templates import Templates
from agent.sandbox.volumes import Volumes
from agent.telemetry import CREATES, DELETES, SANDBOXES, collect_phases, log, step, tracer

_NO_CHANGE = PolicyChange()


class Manager:
    """The registry of sandboxes."""

    def __init__(
        self, machines: Host, images: ImageStore, node: Node, store: Store, templates: Templates | None = None
    ) -> None:
        self.images = images
        self.node = node
        self.templates = templates
        self._host = machines
        self._store = store
        self._entries: dict[str, Entry] = {}
        self._by_request: dict[str, Entry] = {}
        self._events = Events()

    # -- reading -------------------------------------------------------------------------------------------------------

    def get(self, sandbox_id: str) -> Record:
        """Returns a snapshot. :raises NotFound: :raises InvalidSpec: malformed id."""
        return self._entry(sandbox_id).record.copy()

    def list(self) -> list[Record]:
        """Returns snapshots of all sandboxes, oldest first."""
        records = [entry.record.copy() for entry in self._entries.values()]
        return sorted(records, key=lambda record: (record.create_time, record.id))

    def watch(self, wanted: Callable[[Record], bool]) -> AsyncIterator[Event]:
        """Yields what is there, then every change; see `Events.watch`."""
        return self._events.watch(self.list(), wanted)

    def describe_node(self) -> NodeInfo:
        """Returns the node now."""
        return self.node.describe(self._held())

    def _held(self) -> Iterable[SandboxSpec]:
        return [entry.record.spec for entry in self._entries.values()]

    def _entry(self, sandbox_id: str) -> Entry:
        entry = self._entries.get(sandbox_id)
        if entry is None:
            if not is_sandbox_id(sandbox_id):
                raise InvalidSpec(f"{sandbox_id[:80]!r} is not a sandbox id; ids look like sbx-0123456789abcdef")
            raise NotFound(
                f"no sandbox {sandbox_id} on this node; it may have expired: list the sandboxes to see which there are",
                reason="SANDBOX_NOT_FOUND",
            )
        return entry

    async def channel(self, sandbox_id: str) -> Channel:
        """Returns the link to a running sandbox. :raises NotFound: :raises InvalidState: it is not running."""
        return self.running(sandbox_id).channel

    async def ca_certificate(self, sandbox_id: str) -> str:
        """Returns the certificate (PEM) of the CA that the sandbox's guest trusts; "" without one. :raises NotFound:"""
        return await self._host.network.ca_certificate(self._entry(sandbox_id).record)

    def running(self, sandbox_id: str) -> Machine:
        """Returns the machine of a running sandbox. :raises NotFound: :raises InvalidState: it is not running."""
        entry = self._entry(sandbox_id)
        if entry.machine is None or entry.record.state is not State.RUNNING:
            why = f": {entry.record.error}" if entry.record.error else ""
            raise InvalidState(
                f"sandbox {sandbox_id} is {entry.record.state}, not running{why}", reason="SANDBOX_NOT_RUNNING"
            )
        return entry.machine

    def console(self, sandbox_id: str, limit_bytes: int) -> bytes:
        """Returns the last console bytes, of a failed sandbox, too."""
        entry = self._entry(sandbox_id)
        return b"" if entry.machine is None else entry.machine.vm.console_tail(limit_bytes)

    # -- creating ------------------------------------------------------------------------------------------------------

    async def create(self, spec: SandboxSpec, values: Mapping[str, str] = MappingProxyType({})) -> Record:
        """Creates a sandbox and returns it once it runs; with a request_id seen before, returns that one's.

        :param values: of the specification's secrets, by name.

        :raises AlreadyExists: the request_id was used for another request.
        :raises AgentError: it failed; nothing is left.
        """
        entry = self._by_request.get(spec.request_id) if spec.request_id else None
        if entry is None:
            entry = self._begin(spec, values)
        elif not same_request(entry.record.spec, spec) or entry.record.fingerprint != self._fingerprint(spec, values):
            raise AlreadyExists(
                f"request_id {spec.request_id} was used for another request; use a fresh one",
                reason="REQUEST_ID_REUSED",
            )
        if entry.creating is not None:
            await self._created(entry, entry.creating)
        return entry.record.copy()

    async def _created(self, entry: Entry, creating: asyncio.Task[None]) -> None:
        """Awaits a create; the caller's own cancellation leaves it alone, a delete is told to the caller."""
        try:
            await asyncio.shield(creating)
        except asyncio.CancelledError:
            if not creating.cancelled():
                raise
            raise InvalidState(
                f"sandbox {entry.record.id} was deleted while it was being created", reason="SANDBOX_DELETED"
            ) from None

    @property
    def volumes(self) -> Volumes:
        """Volumes and snapshots of this node."""
        return self._host.volumes

    def fitting_image(self, spec: SandboxSpec) -> Image:
        """Returns the image of a sandbox. :raises NotFound: :raises InvalidSpec: it needs more memory."""
        image = self.images.get(spec.image)
        if spec.memory_bytes < image.min_memory_bytes:
            raise InvalidSpec(
                f"memory_bytes is {spec.memory_bytes}; image {spec.image} needs at least {image.min_memory_bytes}"
            )
        return image

    def _fingerprint(self, spec: SandboxSpec, values: Mapping[str, str]) -> str:
        """Tells requests with the same id apart by the values of their secrets, which no record holds."""
        return self._host.network.fingerprint(values) if spec.request_id and values else ""

    def _begin(self, spec: SandboxSpec, values: Mapping[str, str]) -> Entry:
        image = self.fitting_image(spec)
        if self.node.draining:
            raise NodeDraining("this node is draining and takes no sandboxes; try another")
        self.node.admit(spec, self._held())
        now = time.time()
        duration = spec.lifetime.duration_s or spec.lifetime.lease_s
        record = Record(
            new_sandbox_id(), spec, State.CREATING, now, labels=dict(spec.labels), image_digest=image.digest,
            expire_time=None if duration is None else now + duration, net=spec.net, secrets=spec.secrets,
            fingerprint=self._fingerprint(spec, values),
        )  # fmt: skip
        self._host.volumes.attach(record)
        entry = Entry(record)
        self._entries[record.id] = entry
        if spec.request_id:
            self._by_request[spec.request_id] = entry
        self._publish(EventType.CREATED, entry)
        entry.creating = asyncio.create_task(self._create(entry, image, values), name=f"create-{record.id}")
        return entry

    async def _create(self, entry: Entry, image: Image, values: Mapping[str, str]) -> None:
        record = entry.record
        outcome = "failed"
        try:
            with collect_phases() as phases, tracer.start_as_current_span("create"), step("create"):
                with step("intent"):
                    await self._store.put(record)
                    await self._host.network.hold(record, values)
                entry.machine = await Boot(
                    self._host, self.templates, record, image, lambda: self._store.put(record)
                ).run()
                info = await self._host.driver.probe()
                record.vmm = f"{info.name} {info.version} ({info.accelerator})"
                record.phases = phases
                record.move(State.RUNNING)
                if record.spec.lifetime.lease_s is not None:  # nobody could renew it during the boot
                    record.expire_time = time.time() + record.spec.lifetime.lease_s
            await self._store.put(record)  # with all of its phases
            outcome = "ok"
            entry.monitor = asyncio.create_task(self._watch_over(entry), name=f"monitor-{record.id}")
            self._schedule_expiry(entry)
            self._publish(EventType.UPDATED, entry)
        except BaseException as error:
            outcome = "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"
            if entry.deleting is None:
                await asyncio.shield(self._forget(entry, "create failed"))
            raise
        finally:
            CREATES.labels(outcome).inc()
            log.info("create", sandbox_id=record.id, outcome=outcome, image=record.spec.image)

    async def _forget(self, entry: Entry, reason: str) -> None:
        """Removes what is left of a sandbox, then its record: the last step, so that a crash before it is repaired."""
        if entry.machine is not None:
            if (spec := entry.record.spec).root or spec.volumes:
                await dialogue.sync(entry.machine.channel)
            built, entry.machine = entry.machine, None
            entry.half_removed = True  # unless what follows says otherwise
            await built.aclose()
        elif entry.half_removed:
            await host.remove(self._host, entry.record.id)
        entry.held.close()
        await self._host.network.release(entry.record.id)
        self._host.volumes.detach(entry.record)
        await self._store.delete(entry.record.id)
        self._entries.pop(entry.record.id, None)
        if self._by_request.get(entry.record.spec.request_id) is entry:
            del self._by_request[entry.record.spec.request_id]
        entry.record.state = State.DELETED
        self._publish(EventType.DELETED, entry, reason)

    def _publish(self, kind: EventType, entry: Entry, reason: str = "") -> None:
        counts = dict.fromkeys(State, 0)
        for other in self._entries.values():
            counts[other.record.state] += 1
        for state, count in counts.items():
            SANDBOXES.labels(state.value).set(count)
        self._events.publish(kind, entry.record, reason)

    def on_denial(self, record: Record, denial: Denial) -> None:
        """Tells watchers what a sandbox was not let do."""
        self._events.publish_denial(record, denial)

    async def count_drops(self) -> None:
        """Counts, for ever, what the kernel dropped of running sandboxes."""
        await drops.keep_counting(
            self._host.network, lambda: [entry.record for entry in self._entries.values() if entry.runs]
        )

    async def fresh(self, sandbox_id: str) -> Record:
        """As `get`, with what the kernel dropped until now."""
        entry = self._entry(sandbox_id)
        if entry.runs:
            await drops.count(self._host.network, entry.record)
        return self.get(sandbox_id)

    # -- watching over -------------------------------------------------------------------------------------------------

    async def _watch_over(self, entry: Entry) -> None:
        assert entry.machine is not None
        timeout_s = self._host.settings.sandbox.relink_timeout_s
        await self._fail(entry, await until_lost(entry.machine, entry.record.id, timeout_s))

    async def _fail(self, entry: Entry, error: AgentError) -> None:
        """Keeps the sandbox as FAILED with the evidence; its VM is ended, its disk stays until the delete."""
        assert entry.machine is not None
        await entry.machine.vm.stop()
        entry.record.error = f"{error.message}{dialogue.console_note(entry.machine.vm)}"
        entry.record.move(State.FAILED)
        log.error("sandbox failed", sandbox_id=entry.record.id, error=error.message)
        with contextlib.suppress(AgentError):
            await self._store.put(entry.record)
        self._publish(EventType.UPDATED, entry)

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
        record = entry.record
        if entry.deleting is not None:
            raise InvalidState(f"sandbox {sandbox_id} is being deleted", reason="SANDBOX_DELETING")
        leased = record.spec.lifetime.lease_s is not None
        check_lease_change(expire_time, leased=leased, clear=clear_expire_time, end_lease=end_lease)
        check_expire_time(expire_time, time.time())
        labels = changed_labels(record.labels, set_labels, remove_labels)
        if policy:
            async with entry.changing:
                await policy_change.apply(self._host, record, policy, self.running(sandbox_id).channel)
        record.labels = labels
        if end_lease:
            record.spec = dataclasses.replace(record.spec, lifetime=Lifetime())
        if expire_time is not None or clear_expire_time:
            record.expire_time = expire_time
            self._schedule_expiry(entry)
        await self._store.put(record)
        self._publish(EventType.UPDATED, entry)
        return record.copy()

    async def renew_lease(self, sandbox_id: str) -> float:
        """Renews a lease and returns when it lapses. :raises NotFound: :raises InvalidState: it has none."""
        entry = self._entry(sandbox_id)
        lease = entry.record.spec.lifetime.lease_s
        if lease is None:
            raise InvalidState(f"sandbox {sandbox_id} was created without a lease", reason="NO_LEASE")
        if entry.deleting is not None:
            raise InvalidState(f"sandbox {sandbox_id} is being deleted", reason="SANDBOX_DELETING")
        entry.record.expire_time = time.time() + lease
        self._schedule_expiry(entry)
        await self._store.put(entry.record)
        return entry.record.expire_time

    def _schedule_expiry(self, entry: Entry) -> None:
        if entry.expiry is not None:
            entry.expiry.cancel()
            entry.expiry = None
        if entry.record.expire_time is not None:
            delay = max(0.0, entry.record.expire_time - time.time())
            entry.expiry = asyncio.get_running_loop().call_later(delay, self._expire, entry)

    def _expire(self, entry: Entry) -> None:
        reason = "expired" if entry.record.spec.lifetime.lease_s is None else "lease lapsed"
        self._start_delete(entry, reason)

    # -- deleting ------------------------------------------------------------------------------------------------------

    async def delete(self, sandbox_id: str, reason: str = "requested") -> None:
        """Deletes a sandbox and returns when nothing is left; a delete under way is awaited. :raises NotFound:"""
        await asyncio.shield(self._start_delete(self._entry(sandbox_id), reason))

    def _start_delete(self, entry: Entry, reason: str) -> asyncio.Task[None]:
        if entry.deleting is None:
            entry.deleting = asyncio.create_task(self._delete(entry, reason), name=f"delete-{entry.record.id}")
        return entry.deleting

    async def _delete(self, entry: Entry, reason: str) -> None:
        with step("delete"):
            if entry.expiry is not None:
                entry.expiry.cancel()
            for task in (entry.creating, entry.monitor):
                if task is not None and not task.done():
                    task.cancel()
                    await asyncio.wait({task})
            entry.record.state = State.DELETING
            self._publish(EventType.UPDATED, entry, reason)
            try:
                with contextlib.suppress(AgentError):  # a full disk must not keep anyone from deleting
                    await self._store.put(entry.record)
                await self._forget(entry, reason)
            except BaseException as error:
                entry.deleting = None  # the next delete tries again what is left
                log.error("delete failed", sandbox_id=entry.record.id, error=str(error))
                raise
        DELETES.labels(reason).inc()
        log.info("delete", sandbox_id=entry.record.id, reason=reason)

    # -- starting and stopping -----------------------------------------------------------------------------------------

    async def prepare_templates(self) -> None:
        """Keeps the templates of the configured sizes ready until it is cancelled; see `keep_prepared`."""
        if self.templates is not None:
            await keep_prepared(self._host.settings, self.images, self.templates)

    def adopt(self, record: Record, adopted: Machine) -> None:
        """Takes over a sandbox that an earlier agent left running."""
        entry = Entry(record, adopted)
        self._host.volumes.attach(record)
        if record.template and self.templates is not None:
            entry.held.enter_context(self.templates.hold(record.template))
        self._entries[record.id] = entry
        if record.spec.request_id:
            self._by_request[record.spec.request_id] = entry
        entry.monitor = asyncio.create_task(self._watch_over(entry), name=f"monitor-{record.id}")
        self._schedule_expiry(entry)
        self._publish(EventType.UPDATED, entry)

    async def stop(self, *, keep: bool) -> None:
        """Ends the manager: deletes every sandbox, or leaves those that run to the next agent."""
        self.node.draining = True
        pending = [entry for entry in self._entries.values() if not keep or entry.record.state is not State.RUNNING]
        # One that cannot be deleted is logged, and settled by the next agent.
        await asyncio.gather(*(self._start_delete(entry, "agent stopped") for entry in pending), return_exceptions=True)
        if self.templates is not None:
            await self.templates.aclose()
        left, self._entries = self._entries, {}
        for entry in left.values():
            if entry.expiry is not None:
                entry.expiry.cancel()
            if entry.monitor is not None:
                entry.monitor.cancel()
                await asyncio.wait({entry.monitor})
            if entry.machine is not None:
                await entry.machine.detach()
