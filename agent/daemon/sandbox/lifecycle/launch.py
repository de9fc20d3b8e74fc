"""One create, from a record to a machine: host resources, VM, link, configuration, by numbered steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from agent.common.aio import to_the_end
from agent.common.errors import AgentError, DeadlineExceeded, GuestUnreachable, VmmError
from agent.common.telemetry import CLONE_RETRIES, log, step
from agent.daemon.guestlink.channel import Channel
from agent.daemon.sandbox.machine import guest_setup
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.machine.resources import (
    Host,
    make_cgroup,
    make_run_directory,
    make_slots,
    make_state_directory,
)
from agent.daemon.sandbox.machine.vm_shape import disks_of, ram_bytes, shape_of, vm_spec, volume_serial
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.templates.catalog import Templates
from agent.daemon.sandbox.templates.files import Template
from agent.daemon.storage.images import Image
from agent.daemon.storage.volumes import is_snapshot
from agent.daemon.vmm.driver import MemoryFile, Vm, VmSpec

_CLONE_ATTEMPTS = 3
_DISKS_OF_ALL = 2  # root and data
# What the VMM says when a template's device state is of no use, rather than the clone's bad luck.
_BAD_TEMPLATE = frozenset({"VMM_NOT_STARTED", "SNAPSHOT_FAILED"})


class Boot:
    """One create: the steps from a record to a machine.

    :param save: writes the record; called once it says how to find the VM again.
    """

    def __init__(
        self, host: Host, templates: Templates | None, record: Record, image: Image, save: Callable[[], Awaitable[None]]
    ) -> None:
        self._host = host
        self._templates = templates
        self._record = record
        self._image = image
        self._save = save
        self._cgroup: Path | None = None

    async def run(self) -> Machine:
        """Makes the resources of the record in order and returns a machine that is configured.

        :raises AgentError: a step failed; nothing is left, and the message ends with the last lines of the console.
        """
        async with AsyncExitStack() as lasting, AsyncExitStack() as volatile:
            with step("directories"):
                make_state_directory(self._host, self._record.id, self._record.uid, lasting)
                make_run_directory(self._host, self._record.id, volatile)
            with step("cgroup"):
                spec = self._record.spec
                ram = ram_bytes(spec.memory_bytes)
                self._cgroup = await make_cgroup(self._host, self._record.id, spec.vcpu_count, ram, volatile)
            await self._host.network.make(self._record, volatile)
            if self._templates is None:
                vm, channel = await self._start(volatile, await self._cold(), None)
            else:
                vm, channel = await self._clone(volatile, self._templates)
            return Machine(vm, channel, volatile.pop_all(), lasting.pop_all())
        raise AssertionError("unreachable: nothing above suppresses exceptions")

    async def _cold(self) -> VmSpec:
        spec = self._record.spec
        vmm = await self._host.driver.probe()
        volumes = len(spec.volumes)
        shape = shape_of(self._host.settings, self._image, spec.vcpu_count, spec.memory_bytes, vmm, volumes)
        self._record.shape = dataclasses.asdict(shape)
        disks = disks_of(self._host.volumes, spec)
        uid = self._record.uid
        return vm_spec(
            self._host.settings, self._host.paths, self._record.id, shape, self._image, disks=disks, uid=uid,
            cgroup=self._cgroup,
        )  # fmt: skip

    async def _clone(self, stack: AsyncExitStack, templates: Templates) -> tuple[Vm, Channel]:
        """Restores a template; a clone that fails to answer is ended, and another one tried."""
        attempt = 0
        while True:
            attempt += 1
            with step("template"):
                spec = self._record.spec
                template = await templates.get(self._image, spec.vcpu_count, spec.memory_bytes, len(spec.volumes))
            async with AsyncExitStack() as trial:
                trial.enter_context(templates.hold(template.digest))
                try:
                    vm, channel = await self._start(trial, self._restored(template), template)
                except (VmmError, DeadlineExceeded, GuestUnreachable) as error:
                    if attempt == _CLONE_ATTEMPTS:
                        raise
                    CLONE_RETRIES.labels(error.reason).inc()
                    log.warning("a clone failed; trying again", sandbox_id=self._record.id, reason=error.message)
                    if error.reason in _BAD_TEMPLATE:
                        templates.refuse(template, error.message)
                    continue
                self._record.template = template.digest
                stack.push_async_callback(trial.pop_all().aclose)
                return vm, channel

    def _restored(self, template: Template) -> VmSpec:
        memory = MemoryFile(template.ram, private=True)
        host = self._host
        self._record.shape = dataclasses.asdict(template.shape)
        disks = disks_of(host.volumes, self._record.spec)
        return vm_spec(
            host.settings, host.paths, self._record.id, template.shape, self._image, memory, template.vmm, disks,
            self._record.uid, self._cgroup,
        )  # fmt: skip

    async def _start(self, stack: AsyncExitStack, spec: VmSpec, template: Template | None) -> tuple[Vm, Channel]:
        """Starts the VM on a fresh disk and makes its guest this sandbox."""
        settings = self._host.settings
        with step("disk"):
            await self._make_disk()
            make_slots(self._host, self._record.id, len(spec.disks) - _DISKS_OF_ALL)
        with step("vmm.start" if template is None else "vmm.restore"):
            vm = await self._host.driver.start(spec)
            stack.push_async_callback(vm.stop)
        with step("token"):
            self._record.token = dict(vm.resume_token)
            await self._save()
        timeout_s = settings.sandbox.boot_timeout_s if template is None else settings.templates.clone_timeout_s
        try:
            with step("guest.boot" if template is None else "guest.answer"):
                channel = await guest_setup.connect(vm, fresh=True, timeout_s=timeout_s)
            stack.push_async_callback(channel.aclose)
            with step("guest.configure"):
                await guest_setup.configure(channel, self._record, timeout_s)
            for number, (path, volume) in enumerate(self._record.spec.volumes):
                with step("guest.mount"):
                    size = self._host.volumes.capacity(volume)
                    await guest_setup.mount(channel, volume_serial(number), path, size, timeout_s)
            if (order := await self._host.network.trust(self._record)) is not None:
                with step("guest.trust"):
                    await channel.call("sys.trust", timeout_s=timeout_s, **order)
            with step("guest.clock_sync"):
                await guest_setup.set_clock(channel, timeout_s)
        except AgentError as error:
            error.message += guest_setup.console_note(vm)
            error.args = (error.message,)
            raise
        return vm, channel

    async def _make_disk(self) -> None:
        """Makes the writable disk anew, unless it is a volume: a fresh one, or a copy of a snapshot."""
        spec, disk = self._record.spec, self._host.paths.disk(self._record.id)
        if spec.root and not is_snapshot(spec.root):
            return
        disk.unlink(missing_ok=True)  # of a clone that failed
        if spec.root:
            await to_the_end(self._host.volumes.copy(spec.root, disk))
        else:
            await to_the_end(self._host.disks.make_disk(disk, spec.disk_bytes))
