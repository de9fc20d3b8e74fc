"""Networks of sandboxes by their records: values from the record down to the network, results back into the record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack

from agent.common.policy.reasons import Denial, Reason
from agent.daemon.network import drop_counters
from agent.daemon.network.operator_policy import OperatorPolicy
from agent.daemon.network.sandbox_network import KernelState, SandboxNetwork
from agent.daemon.sandbox.state.denials import Denials
from agent.daemon.sandbox.state.record import Record


class RecordNetwork:
    """Puts the policy of records into force; `slot`, `rules` and `denials` of a record follow what the network has."""

    def __init__(self, network: SandboxNetwork, operator: OperatorPolicy, denials: Denials) -> None:
        self._network = network
        self._operator = operator
        self._denials = denials

    async def make(self, record: Record, stack: AsyncExitStack) -> None:
        """Make the network of a sandbox; `stack` removes it.

        :raises AgentError: the kernel or the egress process refused.
        """
        stack.push_async_callback(self.remove, record.id)
        self._denials.track(record)
        try:
            await self._network.make(record.id, self._operator.effective(record.net), record.secrets)
        finally:
            self._note_kernel_state(record)

    async def make_bare(self, sandbox_id: str, stack: AsyncExitStack) -> None:
        """Make a namespace whose tap has no connection to anything; `stack` removes it.

        :raises HostError: the kernel refused.
        """
        stack.push_async_callback(self.remove, sandbox_id)
        await self._network.make_bare(sandbox_id)

    async def adopt(self, record: Record, vmm_pid: int) -> None:
        """Take over the network that an earlier daemon made, in which the VMM runs.

        :raises AgentError: the kernel or the egress process refused.
        """
        self._denials.track(record)
        policy, state = self._operator.effective(record.net), KernelState(record.slot, record.rules)
        await self._network.adopt(record.id, policy, record.secrets, state, vmm_pid)
        self._note_kernel_state(record)

    async def update(self, record: Record) -> None:
        """Put `record.net` and `record.secrets` into force; connections that they no longer allow end.

        :raises AgentError: the kernel or the egress process refused; the record has the state of the kernel.
        """
        try:
            await self._network.update(record.id, self._operator.effective(record.net), record.secrets)
        finally:
            self._note_kernel_state(record)

    async def remove(self, sandbox_id: str) -> None:
        """Remove the whole network of a sandbox, after counting its last drops. Idempotent.

        :raises HostError: the kernel refused.
        """
        if self._denials.tracks(sandbox_id):
            await self.count_drops(sandbox_id)
            self._denials.untrack(sandbox_id)
        await self._network.remove(sandbox_id)

    async def count_drops(self, sandbox_id: str) -> None:
        """Add the packets that the kernel dropped since the last call to the denials of a sandbox."""
        self._add_drops(sandbox_id, await drop_counters.take(self._network, sandbox_id))

    async def keep_counting_drops(self, running: Callable[[], Iterable[str]]) -> None:
        """Do so for all running sandboxes, for ever; see `drop_counters.keep_counting`."""
        await drop_counters.keep_counting(self._network, running, self._add_drops)

    def _add_drops(self, sandbox_id: str, drops: Mapping[Reason, int]) -> None:
        for reason, count in drops.items():
            self._denials.count(sandbox_id, reason, count)
            self._denials.report(sandbox_id, Denial(reason, "", 0, "ip", count))

    def _note_kernel_state(self, record: Record) -> None:
        state = self._network.kernel_state(record.id)
        record.slot, record.rules = state.slot, state.rules
