"""Running half of a sandbox: its VM, its link to the guest, and the cleanup of its host resources."""

from __future__ import annotations

import contextlib
from contextlib import AsyncExitStack
from pathlib import Path

from agent.common.errors import AgentError, InvalidState
from agent.common.model import TAP_NAME, State
from agent.common.telemetry import log, step
from agent.daemon.guestlink.channel import Channel
from agent.daemon.sandbox.machine import guest_setup
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.resources import push_state_removal, push_volatile_removal
from agent.daemon.sandbox.state.record import Record
from agent.daemon.vmm.driver import Vm
from agent.daemon.vmm.usage import VmmUsage, read_usage


class Machine:
    """A VM with a connected guest, or a paused one. `channel` is another object after the link was lost and redialled.

    :param channel: None for a paused VM.
    :param volatile: removes VM, network, cgroup and run directory.
    :param lasting: removes the state directory.
    """

    def __init__(self, vm: Vm, channel: Channel | None, volatile: AsyncExitStack, lasting: AsyncExitStack) -> None:
        self.vm = vm
        self._channel = channel
        self._volatile = volatile
        self._lasting = lasting

    @property
    def channel(self) -> Channel:
        """Current link to the guest; calls on a lost one raise GuestUnreachable.

        :raises InvalidState: the VM is paused.
        """
        if self._channel is None:
            raise InvalidState("the sandbox is paused; resume it first", reason="SANDBOX_NOT_RUNNING")
        return self._channel

    def usage(self) -> VmmUsage:
        """Return CPU time, memory and traffic of the VMM so far. Blocks."""
        return read_usage(self.vm.pid, TAP_NAME)

    def idle_s(self) -> float:
        """Return the seconds since the last call to the guest ended; 0 while a call is open or the VM is paused."""
        return 0.0 if self._channel is None else self._channel.idle_s()

    async def relink(self, timeout_s: float) -> None:
        """Dial the guest again after the link was lost.

        :raises AgentError: the guest did not answer in time, or the VM ended.
        """
        await self._unlink()
        self._channel = await guest_setup.connect(self.vm, fresh=False, timeout_s=timeout_s)

    async def _unlink(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.aclose()

    async def pause(self) -> None:
        """End all calls to the guest and stop the VM's CPUs.

        :raises VmmError: the VMM did not stop them; the link is closed all the same.
        """
        await self._unlink()
        await self.vm.pause()

    async def resume(self, timeout_s: float, hostname: str = "") -> None:
        """Start the CPUs again, dial the guest, and refresh its clock and entropy.

        :param hostname: new identity for the guest of a fork; "" keeps the present one.
        :raises AgentError: the VMM failed, or the guest did not answer in time.
        """
        await self.vm.resume()
        await self.relink(timeout_s)
        await guest_setup.refresh(self.channel, timeout_s, hostname)

    async def sync(self) -> None:
        """Have the guest write its cached data to its disks; best effort, for volumes before their sandbox ends."""
        with contextlib.suppress(AgentError):
            await guest_setup.sync(self.channel)

    async def save(self, directory: Path) -> None:
        """End all calls to the guest, stop the CPUs, and write device state and RAM into `directory`.

        :raises VmmError: the VM cannot be saved, or the write failed.
        """
        await self._unlink()
        await self.vm.save(directory)

    async def aclose(self) -> None:
        """End the VM and remove every resource. Runs every step even if some fail. Idempotent."""
        async with self._lasting:
            await self.release()

    async def release(self) -> None:
        """End the VM and remove every resource but the state directory. Idempotent."""
        await self._unlink()
        await self._volatile.aclose()

    async def detach(self) -> None:
        """Close the link and leave VM and resources to the next agent."""
        await self._unlink()
        self._volatile.pop_all()
        self._lasting.pop_all()


async def adopt(host: HostServices, record: Record) -> Machine | None:
    """Return the machine that an earlier agent left running or paused.

    None if its VM has ended or its guest does not answer; its resources are removed then.
    """
    machine = None
    async with AsyncExitStack() as lasting, AsyncExitStack() as volatile:
        push_state_removal(host, record.id, lasting)
        push_volatile_removal(host, record.id, volatile)
        with step("adopt.vmm"):
            vm = await host.driver.adopt(record.id, host.paths.sandbox_run(record.id), record.token)
        if vm is not None:
            volatile.push_async_callback(vm.stop)
            try:
                channel = await _adopt_network_and_link(host, record, vm)
            except AgentError as error:
                log.warning("a running VM does not answer", sandbox_id=record.id, error=error.message)
            else:
                machine = Machine(vm, channel, volatile.pop_all(), lasting.pop_all())
    return machine


async def _adopt_network_and_link(host: HostServices, record: Record, vm: Vm) -> Channel | None:
    """Return the link to the guest of an adopted VM; None for a paused sandbox."""
    with step("adopt.network"):
        await host.network.adopt(record, vm.pid)
    if record.state is State.PAUSED:
        await vm.pause()
        return None
    if record.maybe_paused:  # the earlier agent died while it had the VM paused
        with step("adopt.resume"):
            await vm.resume()
    with step("adopt.link"):
        return await guest_setup.connect(vm, fresh=False, timeout_s=host.settings.sandbox.relink_timeout_s)
