"""Launch the VM of a new sandbox: host resources, VM, link, guest configuration, as steps named in telemetry."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from agent.common.errors import AgentError, DeadlineExceeded, GuestUnreachable, VmmError
from agent.common.telemetry import CLONE_RETRIES, log, step
from agent.daemon.guestlink.channel import Channel
from agent.daemon.sandbox.machine import guest_setup
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.machine.resources import allocate, create_disks, start_vm
from agent.daemon.sandbox.machine.vm_plan import FreshMemory, TemplateMemory, VmPlan, sandbox_plan
from agent.daemon.sandbox.machine.vm_shape import shape_of, volume_serial
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.templates.catalog import Templates
from agent.daemon.storage.images import Image
from agent.daemon.vmm.driver import Vm

_CLONE_ATTEMPTS = 3
# Reasons that point to a template's device state rather than to one clone.
_BAD_TEMPLATE = frozenset({"VMM_NOT_STARTED", "SNAPSHOT_FAILED"})


class Launch:
    """One launch, from a record to a machine with a configured guest.

    :param templates: None: the VM boots its kernel instead of cloning a template.
    :param save: persists the record; called once the record says how to find the VM again.
    """

    def __init__(
        self,
        host: HostServices,
        templates: Templates | None,
        record: Record,
        image: Image,
        save: Callable[[], Awaitable[None]],
    ) -> None:
        self._host = host
        self._templates = templates
        self._record = record
        self._image = image
        self._save = save

    async def run(self) -> Machine:
        """Return the machine of the sandbox, its guest configured.

        :raises AgentError: a step failed; nothing is left, and the message ends with the last lines of the console.
        """
        spec, vmm = self._record.spec, await self._host.driver.probe()
        shape = shape_of(self._host.settings, self._image, spec.vcpu_count, spec.memory_bytes, vmm, len(spec.volumes))
        self._record.shape = dataclasses.asdict(shape)
        plan = sandbox_plan(self._host, self._record, self._image, shape, FreshMemory())
        async with allocate(self._host, plan) as allocated:
            if self._templates is None:
                vm, channel = await self._start(plan, allocated.cgroup, allocated.volatile)
            else:
                vm, channel = await self._clone(plan, allocated.cgroup, allocated.volatile, self._templates)
            return Machine(vm, channel, *allocated.keep())
        raise AssertionError("unreachable: nothing above suppresses exceptions")

    async def _clone(
        self, plan: VmPlan, cgroup: Path | None, stack: AsyncExitStack, templates: Templates
    ) -> tuple[Vm, Channel]:
        """Start a clone of a template; end a clone that fails to answer, and start another one."""
        spec, attempt = self._record.spec, 0
        while True:
            attempt += 1
            with step("template"):
                template = await templates.get(self._image, spec.vcpu_count, spec.memory_bytes, len(spec.volumes))
            clone = dataclasses.replace(plan, memory=TemplateMemory(template.ram, template.vmm))
            async with AsyncExitStack() as trial:
                trial.enter_context(templates.pin(template.digest))
                try:
                    vm, channel = await self._start(clone, cgroup, trial)
                except (VmmError, DeadlineExceeded, GuestUnreachable) as error:
                    if attempt == _CLONE_ATTEMPTS:
                        raise
                    CLONE_RETRIES.labels(error.reason).inc()
                    log.warning("a clone failed; trying again", sandbox_id=self._record.id, reason=error.message)
                    if error.reason in _BAD_TEMPLATE:
                        templates.reject(template, error.message)
                    continue
                self._record.template = template.digest
                stack.push_async_callback(trial.pop_all().aclose)
                return vm, channel

    async def _start(self, plan: VmPlan, cgroup: Path | None, stack: AsyncExitStack) -> tuple[Vm, Channel]:
        """Start the VM on a fresh data disk and configure its guest as this sandbox."""
        await create_disks(self._host, plan)
        vm = await start_vm(self._host, plan, cgroup, stack)
        with step("token"):
            self._record.token = dict(vm.resume_token)
            await self._save()
        boots = isinstance(plan.memory, FreshMemory)
        settings = self._host.settings
        timeout_s = settings.sandbox.boot_timeout_s if boots else settings.templates.clone_timeout_s
        try:
            with step("guest.boot" if boots else "guest.answer"):
                channel = await guest_setup.connect(vm, fresh=True, timeout_s=timeout_s)
            stack.push_async_callback(channel.aclose)
            await self._configure(channel, timeout_s)
        except AgentError as error:
            guest_setup.add_console(error, vm)
            raise
        return vm, channel

    async def _configure(self, channel: Channel, timeout_s: float) -> None:
        with step("guest.configure"):
            await guest_setup.configure(channel, self._record, timeout_s)
        for slot, (path, volume) in enumerate(self._record.spec.volumes):
            with step("guest.mount"):
                size_bytes = self._host.volumes.capacity(volume)
                await guest_setup.mount(channel, volume_serial(slot), path, size_bytes, timeout_s)
        if (trust := await self._host.secrets.trust_fields(self._record.id, self._record.secrets)) is not None:
            with step("guest.trust"):
                await channel.call("sys.trust", timeout_s=timeout_s, **trust)
        with step("guest.clock_sync"):
            await guest_setup.set_clock(channel, timeout_s)
