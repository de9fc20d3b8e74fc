"""The life of a sandbox from its create to its delete, and who watches over it meanwhile.

Lifecycle work runs in tasks of ours: a caller that leaves does not cancel it. A create that fails leaves nothing, not
even a record; a sandbox that dies after it was RUNNING stays as FAILED, with its last console lines, until it is
deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

from agent.common.errors import AgentError, AlreadyExists, InvalidSpec, ResourceExhausted, VmmError
from agent.common.model import SandboxSpec, State, new_sandbox_id
from agent.common.telemetry import CREATES, DELETES, VMM_OUT_OF_MEMORY, collect_phases, log, step
from agent.daemon.sandbox.capacity.node import Node
from agent.daemon.sandbox.lifecycle import expiry
from agent.daemon.sandbox.lifecycle.entry import Entry
from agent.daemon.sandbox.lifecycle.launch import Launch
from agent.daemon.sandbox.lifecycle.operations import Operations
from agent.daemon.sandbox.lifecycle.registry import Registry
from agent.daemon.sandbox.lifecycle.watch import until_lost
from agent.daemon.sandbox.machine import guest_setup, resources
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.state.events import EventType
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.store import Store
from agent.daemon.sandbox.state.validation import same_request
from agent.daemon.sandbox.templates.catalog import Templates
from agent.daemon.storage.images import Image, ImageStore
from guest.oom import OomWatcher


class Lifecycle(Registry):
    """Makes and ends sandboxes."""

    def __init__(
        self, machines: HostServices, images: ImageStore, node: Node, store: Store, templates: Templates | None
    ) -> None:
        super().__init__(machines, node)
        self.images = images
        self.templates = templates
        self._store = store
        self._operations = Operations()
        self._oom = OomWatcher()

    # -- creating ------------------------------------------------------------------------------------------------------

    async def create(self, spec: SandboxSpec, values: Mapping[str, str] = MappingProxyType({})) -> Record:
        """Creates a sandbox and returns it once it runs; with a request_id seen before, returns that one's.

        :param values: of the specification's secrets, by name.

        :raises AlreadyExists: the request_id was used for another request.
        :raises AgentError: it failed; nothing is left.
        """
        entry = self._by_request.get(spec.request_id)
        if entry is None:
            self.fitting_image(spec)
            async with self.admission.room([spec], lambda: spec.request_id in self._by_request):
                # The same request may have come once more while this one waited.
                entry = self._by_request.get(spec.request_id) or self._begin(spec, values)
        if not same_request(entry.record.spec, spec) or entry.record.fingerprint != self._fingerprint(spec, values):
            raise AlreadyExists(
                f"request_id {spec.request_id} was used for another request; use a fresh one",
                reason="REQUEST_ID_REUSED",
            )
        if entry.creating is not None:
            await self._operations.join(entry, "create", entry.creating)
        return entry.record.copy()

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
        record = Record(
            new_sandbox_id(), spec, State.CREATING, time.time(), labels=dict(spec.labels), image_digest=image.digest,
            net=spec.net, secrets=spec.secrets, fingerprint=self._fingerprint(spec, values),
        )  # fmt: skip
        self._host.volumes.attach(record)

        async def hold() -> None:
            await self._host.network.hold(record, values)

        launch = Launch(self._host, self.templates, record, image, lambda: self._store.put(record))
        try:
            return self._enter(record, hold, launch.run)
        except ResourceExhausted:  # no user is left for it
            self._host.volumes.detach(record)
            raise

    def _enter(
        self, record: Record, hold: Callable[[], Awaitable[None]], make: Callable[[], Awaitable[Machine]]
    ) -> Entry:
        """Enters a new sandbox and starts to make it: `hold` keeps its secrets, `make` returns its machine."""
        if (duration := record.spec.lifetime.duration_s or record.spec.lifetime.lease_s) is not None:
            expiry.live_for(record, duration)
        record.uid = self._host.uids.reserve()
        entry = Entry(record)
        self._add(entry)
        self._publish(EventType.CREATED, entry)
        entry.creating = self._operations.start(entry, "create", lambda: self._create(entry, hold, make))
        return entry

    async def _create(
        self, entry: Entry, hold: Callable[[], Awaitable[None]], make: Callable[[], Awaitable[Machine]]
    ) -> None:
        record = entry.record
        outcome = "failed"
        try:
            with collect_phases() as phases, step("create"):
                with step("intent"):
                    await self._store.put(record)
                    await hold()
                entry.machine = await make()
                info = await self._host.driver.probe()
                record.vmm = f"{info.name} {info.version} ({info.accelerator})"
                record.phases = phases
                record.move(State.RUNNING)
                if record.spec.lifetime.lease_s is not None:  # nobody could renew it during the boot
                    expiry.live_for(record, record.spec.lifetime.lease_s)
            await self._store.put(record)  # with all of its phases
            outcome = "ok"
            self._start_watch(entry)
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
                await entry.machine.sync()
            built, entry.machine = entry.machine, None
            entry.needs_cleanup = True  # unless what follows says otherwise
            with step("delete.machine"):
                await built.aclose()
        elif entry.needs_cleanup:
            with step("delete.machine"):
                await resources.remove(self._host, entry.record.id)
        entry.cleanup_stack.close()
        with step("delete.secrets"):
            await self._host.network.release(entry.record.id)
        self._host.volumes.detach(entry.record)
        with step("delete.record"):
            await self._store.delete(entry.record.id)
        self._drop(entry)
        self._host.uids.release(entry.record.uid)
        entry.record.state = State.DELETED
        self._publish(EventType.DELETED, entry, reason)

    # -- watching over -------------------------------------------------------------------------------------------------

    def _start_watch(self, entry: Entry) -> None:
        entry.monitor = asyncio.create_task(self._watch_over(entry), name=f"monitor-{entry.record.id}")

    async def _stop_watch(self, entry: Entry) -> None:
        if entry.monitor is not None:
            entry.monitor.cancel()
            await asyncio.wait({entry.monitor})

    async def _watch_over(self, entry: Entry) -> None:
        assert entry.machine is not None
        if entry.record.state is State.PAUSED:
            why: AgentError = guest_setup.vmm_ended(await entry.machine.vm.wait())
        else:
            timeout_s = self._host.settings.sandbox.relink_timeout_s
            why = await until_lost(entry.machine, entry.record.id, timeout_s)
        await self._fail(entry, self._of_memory(entry, why))

    def _of_memory(self, entry: Entry, why: AgentError) -> AgentError:
        """Returns why a sandbox has ended, told apart if the host ended its VMM for lack of memory."""
        assert entry.machine is not None
        # The log is read either way, or what it says now would be found at another end.
        logged = self._oom.killed(entry.machine.vm.pid)
        if why.reason != "VMM_ENDED" or not (logged or self._host.cgroups.out_of_memory(entry.record.id)):
            return why
        VMM_OUT_OF_MEMORY.inc()
        return VmmError(
            "the host ended the sandbox's virtual machine for lack of memory: raise cgroups.memory_headroom_bytes or "
            f"node.reserved_memory_bytes ({why.message})",
            reason="VMM_OUT_OF_MEMORY",
        )

    async def _fail(self, entry: Entry, error: AgentError) -> None:
        """Keeps the sandbox as FAILED with the evidence; its VM is ended, its disk stays until the delete."""
        assert entry.machine is not None
        await entry.machine.vm.stop()
        entry.record.error = f"{error.message}{guest_setup.console_note(entry.machine.vm)}"
        entry.record.move(State.FAILED)
        log.error("sandbox failed", sandbox_id=entry.record.id, error=error.message)
        with contextlib.suppress(AgentError):
            await self._store.put(entry.record)
        self._publish(EventType.UPDATED, entry)

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
            await self._stop_watch(entry)
            await self._operations.cancel(entry)
            await self._stop_watch(entry)  # which a change may have begun anew
            entry.record.state = State.DELETING
            self._publish(EventType.UPDATED, entry, reason)
            try:
                with step("delete.intent"), contextlib.suppress(AgentError):  # a full disk must not keep anyone
                    await self._store.put(entry.record)
                await self._forget(entry, reason)
            except BaseException as error:
                entry.deleting = None  # the next delete tries again what is left
                log.error("delete failed", sandbox_id=entry.record.id, error=str(error))
                raise
        DELETES.labels(reason).inc()
        log.info("delete", sandbox_id=entry.record.id, reason=reason)
