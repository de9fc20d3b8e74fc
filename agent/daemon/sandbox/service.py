"""Facade of the sandboxes of one node, for the gRPC services: each call goes to the part that does the work."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from agent.common.background import Supervisor
from agent.common.config.settings import Settings
from agent.common.model import Lifetime, SandboxSpec, State
from agent.daemon.guestlink.channel import Channel
from agent.daemon.sandbox.capacity.admission import Admission
from agent.daemon.sandbox.capacity.drain import Drain
from agent.daemon.sandbox.capacity.node import Node, NodeInfo
from agent.daemon.sandbox.lifecycle.create import Creator
from agent.daemon.sandbox.lifecycle.delete import Deleter
from agent.daemon.sandbox.lifecycle.expiry import Expiry
from agent.daemon.sandbox.lifecycle.fork import Forker
from agent.daemon.sandbox.lifecycle.pause import Pauser
from agent.daemon.sandbox.lifecycle.policy_change import PolicyChange
from agent.daemon.sandbox.lifecycle.registry import SandboxRegistry
from agent.daemon.sandbox.lifecycle.transition import Transitions
from agent.daemon.sandbox.lifecycle.update import Updater
from agent.daemon.sandbox.lifecycle.watch import Monitor
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.recovery import Recovery
from agent.daemon.sandbox.state.events import Event, Events
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.store import Store
from agent.daemon.sandbox.templates.catalog import Templates
from agent.daemon.sandbox.templates.prewarm import keep_prepared
from agent.daemon.storage.images import Image, ImageStore
from agent.daemon.storage.volumes import Volumes

# States that outlive an agent which leaves its sandboxes to the next one.
_LIVING = frozenset({State.RUNNING, State.PAUSED, State.SUSPENDED})
_NO_SECRETS: Mapping[str, str] = MappingProxyType({})
_NO_CHANGE = PolicyChange()


@dataclass(eq=False)
class SandboxService:
    """The sandboxes of this node.

    :param templates: None: each VM boots its kernel.
    """

    host: HostServices
    images: ImageStore
    templates: Templates | None
    node: Node
    registry: SandboxRegistry
    admission: Admission
    creator: Creator
    deleter: Deleter
    pauser: Pauser
    forker: Forker
    updater: Updater
    expiry: Expiry
    drain: Drain
    recovery: Recovery

    @classmethod
    def build(
        cls,
        host: HostServices,
        images: ImageStore,
        node: Node,
        store: Store,
        events: Events,
        supervisor: Supervisor,
        templates: Templates | None = None,
    ) -> SandboxService:
        """Build a service and its parts; no sandbox is known before `recovery.run`."""
        settings = host.settings
        registry = SandboxRegistry(events)
        admission = Admission(settings.node, node, registry.reserved)
        registry.on_change.add(admission.wake_first)
        monitor = Monitor(settings.sandbox, host.cgroups, store, registry)
        transitions = Transitions(store, registry, monitor, settings.sandbox.relink_timeout_s)
        deleter = Deleter(host, store, registry)
        creator = Creator(host, images, templates, store, registry, admission, monitor, deleter)

        async def evict() -> None:
            await deleter.delete_all(registry.entries(), "evicted")

        return cls(
            host,
            images,
            templates,
            node,
            registry,
            admission,
            creator,
            deleter,
            Pauser(host, images, registry, admission, monitor, transitions),
            Forker(host, images, store, registry, admission, creator, deleter, transitions),
            Updater(host, store, registry),
            Expiry(store, registry, deleter),
            Drain(node, store, lambda: len(registry), evict, supervisor),
            Recovery(host, store, registry, monitor, templates),
        )

    # -- lookup --------------------------------------------------------------------------------------------------------

    def get(self, sandbox_id: str) -> Record:
        """Return a copy of a sandbox's record; see `SandboxRegistry.get`."""
        return self.registry.get(sandbox_id)

    async def inspect(self, sandbox_id: str) -> Record:
        """Return a copy of a sandbox's record, with the packets counted that the kernel has dropped until now.

        :raises NotFound: the node has no such sandbox.
        """
        entry = self.registry.entry(sandbox_id)
        if entry.runs:
            await self.host.network.count_drops(sandbox_id)
        return self.registry.get(sandbox_id)

    def list(self) -> list[Record]:
        """Return copies of all records, by create time."""
        return self.registry.list()

    def watch(self, wanted: Callable[[Record], bool]) -> AsyncIterator[Event]:
        """Yield the present sandboxes, then every change; see `Events.watch`."""
        return self.registry.watch(wanted)

    def running(self, sandbox_id: str) -> Machine:
        """Return the machine of a running sandbox; see `SandboxRegistry.running`."""
        return self.registry.running(sandbox_id)

    def channel(self, sandbox_id: str) -> Channel:
        """Return the link to the guest of a running sandbox; see `SandboxRegistry.running`."""
        return self.registry.running(sandbox_id).channel

    def console(self, sandbox_id: str, limit_bytes: int) -> bytes:
        """Return the last bytes of a sandbox's console, of a failed sandbox as well; empty without a VM.

        :raises NotFound: the node has no such sandbox.
        """
        machine = self.registry.entry(sandbox_id).machine
        return b"" if machine is None else machine.vm.console_tail(limit_bytes)

    async def ca_certificate(self, sandbox_id: str) -> str:
        """Return the certificate of the CA that the sandbox's guest trusts, in PEM; "" without one.

        :raises NotFound: the node has no such sandbox.
        """
        return await self.host.secrets.ca_certificate(self.registry.entry(sandbox_id).record.id)

    @property
    def volumes(self) -> Volumes:
        """Volumes and snapshots of this node."""
        return self.host.volumes

    def describe_node(self) -> NodeInfo:
        """Return the state of the node now."""
        return self.node.describe(self.registry.reserved())

    def fitting_image(self, spec: SandboxSpec) -> Image:
        """Return the image for a specification; see `Creator.fitting_image`."""
        return self.creator.fitting_image(spec)

    # -- operations ----------------------------------------------------------------------------------------------------

    async def create(self, spec: SandboxSpec, secret_values: Mapping[str, str] = _NO_SECRETS) -> Record:
        """Create a sandbox and return its record once it runs; see `Creator.create`."""
        return await self.creator.create(spec, secret_values)

    async def delete(self, sandbox_id: str, reason: str = "requested") -> None:
        """Delete a sandbox and return when nothing of it is left; see `Deleter.delete`.

        :raises NotFound: the node has no such sandbox.
        """
        await self.deleter.delete(self.registry.entry(sandbox_id), reason)

    async def pause(self, sandbox_id: str, *, to_disk: bool) -> Record:
        """Pause a sandbox, or suspend it to disk; see `Pauser.pause`."""
        return await self.pauser.pause(sandbox_id, to_disk=to_disk)

    async def resume(self, sandbox_id: str) -> Record:
        """Resume a paused or suspended sandbox; see `Pauser.resume`."""
        return await self.pauser.resume(sandbox_id)

    async def fork(
        self, sandbox_id: str, count: int, *, labels: Mapping[str, str], lifetime: Lifetime | None, request_id: str
    ) -> Sequence[Record]:
        """Create `count` copies of a sandbox as it is now; see `Forker.fork`."""
        return await self.forker.fork(sandbox_id, count, labels=labels, lifetime=lifetime, request_id=request_id)

    async def update(
        self, sandbox_id: str, *, expire_time: float | None, clear_expire_time: bool,
        set_labels: Mapping[str, str], remove_labels: Iterable[str], policy: PolicyChange = _NO_CHANGE,
        end_lease: bool = False,
    ) -> Record:  # fmt: skip
        """Update labels, expire time, lease, network policy and secrets of a sandbox; see `Updater.update`."""
        return await self.updater.update(
            sandbox_id, expire_time=expire_time, clear_expire_time=clear_expire_time, set_labels=set_labels,
            remove_labels=remove_labels, policy=policy, end_lease=end_lease,
        )  # fmt: skip

    async def renew_lease(self, sandbox_id: str) -> float:
        """Renew the lease of a sandbox and return when it lapses; see `Updater.renew_lease`."""
        return await self.updater.renew_lease(sandbox_id)

    # -- the node ------------------------------------------------------------------------------------------------------

    def reconfigure(self, settings: Settings) -> None:
        """Apply other limits and labels of the node from now on; present sandboxes stay."""
        self.node.reconfigure(settings)
        self.admission.reconfigure(settings.node)

    async def prewarm_templates(self) -> None:
        """Keep the templates of the configured sizes built until cancelled; see `keep_prepared`."""
        if self.templates is not None:
            await keep_prepared(self.host.settings, self.images, self.templates)

    async def count_drops(self) -> None:
        """Count the packets that the kernel drops of running sandboxes, until cancelled."""
        await self.host.network.keep_counting_drops(
            lambda: [entry.record.id for entry in self.registry.entries() if entry.runs]
        )

    async def stop(self, *, keep: bool) -> None:
        """Delete every sandbox, or leave living ones to the next agent.

        :param keep: leave sandboxes that run, are paused or are suspended.
        """
        await self.drain.aclose()
        self.node.set_draining("the agent is stopping")
        ending = [entry for entry in self.registry.entries() if not keep or entry.record.state not in _LIVING]
        await self.deleter.delete_all(ending, "agent stopped")  # the next agent removes what could not be deleted
        if self.templates is not None:
            await self.templates.aclose()
        left = self.registry.entries()
        self.registry.clear()
        for entry in left:
            await entry.operations.cancel()  # a half done operation is undone before the next agent looks
            if entry.machine is not None:
                await entry.machine.detach()
