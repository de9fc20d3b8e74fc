"""Create a sandbox, idempotently by request_id. A create that fails leaves nothing, not even a record."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

from agent.common.errors import AlreadyExists, InvalidSpec, ResourceExhausted
from agent.common.model import SandboxSpec, State, new_sandbox_id
from agent.common.telemetry import CREATES, collect_phases, log, step
from agent.daemon.sandbox.capacity.admission import Admission
from agent.daemon.sandbox.lifecycle import expiry
from agent.daemon.sandbox.lifecycle.delete import Deleter
from agent.daemon.sandbox.lifecycle.launch import Launch
from agent.daemon.sandbox.lifecycle.registry import SandboxEntry, SandboxRegistry
from agent.daemon.sandbox.lifecycle.watch import Monitor
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.state.events import EventType
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.store import Store
from agent.daemon.sandbox.state.validation import same_request
from agent.daemon.sandbox.templates.catalog import Templates
from agent.daemon.storage.images import Image, ImageStore

_NO_SECRETS: Mapping[str, str] = MappingProxyType({})


class Creator:
    """Creates sandboxes.

    :param templates: None: each VM boots its kernel.
    :param deleter: removes what a failed create leaves.
    """

    def __init__(
        self,
        host: HostServices,
        images: ImageStore,
        templates: Templates | None,
        store: Store,
        registry: SandboxRegistry,
        admission: Admission,
        monitor: Monitor,
        deleter: Deleter,
    ) -> None:
        self._host = host
        self._images = images
        self._templates = templates
        self._store = store
        self._registry = registry
        self._admission = admission
        self._monitor = monitor
        self._deleter = deleter

    async def create(self, spec: SandboxSpec, secret_values: Mapping[str, str] = _NO_SECRETS) -> Record:
        """Create a sandbox and return its record once it runs; a known request_id returns the sandbox of that request.

        Cancelling the caller does not stop the create.

        :param secret_values: values of the specification's secrets, by name.
        :raises AlreadyExists: the request_id was used for another request.
        :raises NotFound: no such image.
        :raises ResourceExhausted: the node, the tenant's quota or the pool of UIDs is full.
        :raises AgentError: a step failed; nothing is left.
        """
        entry = self._registry.by_request(spec.request_id)
        if entry is None:
            self.fitting_image(spec)
            async with self._admission.room([spec], lambda: self._registry.by_request(spec.request_id) is not None):
                # The same request may have arrived again while this one waited.
                entry = self._registry.by_request(spec.request_id) or self._begin(spec, secret_values)
        fingerprint = self._fingerprint(spec, secret_values)
        if not same_request(entry.record.spec, spec) or entry.record.fingerprint != fingerprint:
            raise request_id_reused(spec.request_id)
        await entry.operations.join_create()
        return entry.record.copy()

    def fitting_image(self, spec: SandboxSpec) -> Image:
        """Return the image for a specification.

        :raises NotFound: no such image.
        :raises InvalidSpec: the image needs more memory than the specification has.
        """
        image = self._images.get(spec.image)
        if spec.memory_bytes < image.min_memory_bytes:
            raise InvalidSpec(
                f"memory_bytes is {spec.memory_bytes}; image {spec.image} needs at least {image.min_memory_bytes}"
            )
        return image

    def _fingerprint(self, spec: SandboxSpec, secret_values: Mapping[str, str]) -> str:
        """Return a digest of secret values, to compare requests of one id: records never hold the values."""
        return self._host.secrets.fingerprint(secret_values) if spec.request_id and secret_values else ""

    def _begin(self, spec: SandboxSpec, secret_values: Mapping[str, str]) -> SandboxEntry:
        image = self.fitting_image(spec)
        record = Record(
            new_sandbox_id(), spec, State.CREATING, time.time(), labels=dict(spec.labels), image_digest=image.digest,
            net=spec.net, secrets=spec.secrets, fingerprint=self._fingerprint(spec, secret_values),
        )  # fmt: skip
        self._host.volumes.attach(record.id, record.volume_ids)

        async def store_secrets() -> None:
            await self._host.secrets.store_secrets(record.id, record.secrets, secret_values, inspect=record.net.inspect)

        launch = Launch(self._host, self._templates, record, image, lambda: self._store.put(record))
        try:
            return self.begin(record, store_secrets, launch.run)
        except ResourceExhausted:  # no UID is left
            self._host.volumes.detach(record.id)
            raise

    def begin(
        self, record: Record, store_secrets: Callable[[], Awaitable[None]], make: Callable[[], Awaitable[Machine]]
    ) -> SandboxEntry:
        """Register a new sandbox and start its create; the caller has checked that there is room.

        :param store_secrets: stores the values of the sandbox's secrets.
        :param make: returns the running machine, or leaves nothing of it.
        :raises ResourceExhausted: no UID is left for its VMM.
        """
        if (duration := record.spec.lifetime.duration_s or record.spec.lifetime.lease_s) is not None:
            expiry.live_for(record, duration)
        record.uid = self._host.uids.reserve()
        entry = SandboxEntry(record)
        self._registry.add(entry)
        self._registry.publish(EventType.CREATED, entry)
        entry.operations.start_create(lambda: self._create(entry, store_secrets, make))
        return entry

    async def _create(
        self, entry: SandboxEntry, store_secrets: Callable[[], Awaitable[None]], make: Callable[[], Awaitable[Machine]]
    ) -> None:
        record = entry.record
        outcome = "failed"
        try:
            with collect_phases() as phases, step("create"):
                with step("intent"):
                    await self._store.put(record)
                    await store_secrets()
                entry.machine = await make()
                info = await self._host.driver.probe()
                record.vmm = f"{info.name} {info.version} ({info.accelerator})"
                record.phases = phases
                record.move(State.RUNNING)
                if record.spec.lifetime.lease_s is not None:  # a lease cannot be renewed before its sandbox runs
                    expiry.live_for(record, record.spec.lifetime.lease_s)
            await self._store.put(record)  # outside the step, which adds the last of the phases
            outcome = "ok"
            self._monitor.start(entry)
            self._registry.publish(EventType.UPDATED, entry)
        except BaseException as error:
            outcome = "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"
            if not entry.operations.deleting:
                await self._deleter.discard(entry, "create failed")
            raise
        finally:
            CREATES.labels(outcome).inc()
            event = "sandbox created" if outcome == "ok" else "sandbox not created"
            log.info(event, sandbox_id=record.id, outcome=outcome, image=record.spec.image)


def request_id_reused(request_id: str) -> AlreadyExists:
    """Return the error for a request_id that belongs to a request with other contents."""
    return AlreadyExists(
        f"request_id {request_id} was used for another request; use a fresh one", reason="REQUEST_ID_REUSED"
    )
