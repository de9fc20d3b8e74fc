"""The running half of a sandbox: its VM, its link, its host resources."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from agent.common.errors import AgentError, InvalidState
from agent.common.model import State
from agent.common.telemetry import log, step
from agent.daemon.guestlink.channel import Channel
from agent.daemon.network.kernel import namespaces
from agent.daemon.sandbox.machine import guest_setup
from agent.daemon.sandbox.machine.resources import Host, push_state_removal, push_volatile_removal
from agent.daemon.sandbox.state.record import Record
from agent.daemon.vmm.cost import Cost, cost_of
from agent.daemon.vmm.driver import Vm


class Machine:
    """A VM that answers, or one that stands still. `channel` changes when the link is dropped and dialled again.

    :param channel: None if it stands still.
    :param volatile: removes what goes with the VM. :param lasting: removes what is on the disk.
    """

    def __init__(self, vm: Vm, channel: Channel | None, volatile: AsyncExitStack, lasting: AsyncExitStack) -> None:
        self.vm = vm
        self._channel = channel
        self._volatile = volatile
        self._lasting = lasting

    @property
    def channel(self) -> Channel:
        """The link as it is now; calls on a lost one raise GuestUnreachable. :raises InvalidState: it stands still."""
        if self._channel is None:
            raise InvalidState("the sandbox is paused; resume it first", reason="SANDBOX_NOT_RUNNING")
        return self._channel

    def cost(self) -> Cost:
        """Returns what the VMM has used on the host so far."""
        return cost_of(self.vm.pid, namespaces.TAP)

    def idle_s(self) -> float:
        """Returns for how long nobody has used the guest; 0 while a call is open."""
        return 0.0 if self._channel is None else self._channel.idle_s()

    async def relink(self, timeout_s: float) -> None:
        """Dials again after the link was lost. :raises AgentError: no answer in time, or the VM ended."""
        await self._unlink()
        self._channel = await guest_setup.connect(self.vm, fresh=False, timeout_s=timeout_s)

    async def _unlink(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.aclose()

    async def stand_still(self) -> None:
        """Ends all calls and stops the VM's CPUs. :raises VmmError:"""
        await self._unlink()
        await self.vm.pause()

    async def go_on(self, timeout_s: float, hostname: str = "") -> None:
        """Lets the CPUs go on, dials, and brings the guest to now, as a copy under a name of its own.

        :raises AgentError:
        """
        await self.vm.resume()
        await self.relink(timeout_s)
        await guest_setup.refresh(self.channel, timeout_s, hostname)

    async def save(self, directory: Path) -> None:
        """Ends all calls, stops the CPUs, and writes all of the VM into a directory. :raises VmmError:"""
        await self._unlink()
        await self.vm.save(directory)

    async def aclose(self) -> None:
        """Ends the VM and removes every resource. Runs every step even if some fail; idempotent."""
        async with self._lasting:
            await self.vanish()

    async def vanish(self) -> None:
        """Ends the VM, and removes all but what is on the disk. Idempotent."""
        await self._unlink()
        await self._volatile.aclose()

    async def detach(self) -> None:
        """Leaves VM and resources to the next agent."""
        await self._unlink()
        self._volatile.pop_all()
        self._lasting.pop_all()


async def adopt(host: Host, record: Record) -> Machine | None:
    """Returns the machine that an earlier agent left running or paused, or None; then its resources are gone."""
    async with AsyncExitStack() as lasting, AsyncExitStack() as volatile:
        push_state_removal(host, record.id, lasting)
        push_volatile_removal(host, record.id, volatile)
        with step("adopt.vmm"):
            vm = await host.driver.adopt(record.id, host.paths.sandbox_run(record.id), record.token)
        if vm is None:
            return None
        volatile.push_async_callback(vm.stop)
        try:
            with step("adopt.network"):
                await host.network.adopt(record, vm.pid)
            if record.state is State.PAUSED:
                await vm.pause()
                return Machine(vm, None, volatile.pop_all(), lasting.pop_all())
            if record.standing:  # an agent died meanwhile
                with step("adopt.resume"):
                    await vm.resume()
            with step("adopt.link"):
                channel = await guest_setup.connect(vm, fresh=False, timeout_s=host.settings.sandbox.relink_timeout_s)
        except AgentError as error:
            log.warning("a running VM does not answer", sandbox_id=record.id, error=error.message)
            return None
        return Machine(vm, channel, volatile.pop_all(), lasting.pop_all())
    raise AssertionError("unreachable: nothing above suppresses exceptions")
