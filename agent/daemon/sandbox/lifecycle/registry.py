"""Which sandboxes there are on this node, and who is told of changes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

from agent.common.errors import InvalidSpec, InvalidState, NotFound
from agent.common.model import SandboxSpec, State, is_sandbox_id
from agent.common.telemetry import SANDBOXES
from agent.daemon.guestlink.channel import Channel
from agent.daemon.network import drop_counters
from agent.daemon.sandbox.capacity.admission import Admission
from agent.daemon.sandbox.capacity.node import Node, NodeInfo
from agent.daemon.sandbox.lifecycle.entry import Entry
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.state.events import Denial, Event, Events, EventType
from agent.daemon.sandbox.state.record import Record
from agent.daemon.storage.volumes import Volumes

# Neither CPU nor memory: what is on the disk alone is admitted again when it is resumed.
_HOLD_NOTHING = frozenset({State.LOST, State.FAILED, State.SUSPENDED, State.DELETED})


class Registry:
    """The sandboxes of this node."""

    def __init__(self, machines: HostServices, node: Node) -> None:
        self.node = node
        self.admission = Admission(machines.settings.node, node, self._held)
        self._host = machines
        self._entries: dict[str, Entry] = {}
        self._by_request: dict[str, Entry] = {}
        self._events = Events()

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

    def _held(self) -> Sequence[SandboxSpec]:
        return [entry.record.spec for entry in self._entries.values() if entry.record.state not in _HOLD_NOTHING]

    @property
    def volumes(self) -> Volumes:
        """Volumes and snapshots of this node."""
        return self._host.volumes

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

    def _add(self, entry: Entry) -> None:
        self._entries[entry.record.id] = entry
        if entry.record.spec.request_id:
            self._by_request[entry.record.spec.request_id] = entry

    def _drop(self, entry: Entry) -> None:
        self._entries.pop(entry.record.id, None)
        if self._by_request.get(entry.record.spec.request_id) is entry:
            del self._by_request[entry.record.spec.request_id]

    # -- what runs -----------------------------------------------------------------------------------------------------

    async def channel(self, sandbox_id: str) -> Channel:
        """Returns the link to a running sandbox. :raises NotFound: :raises InvalidState: it is not running."""
        return self.running(sandbox_id).channel

    def running(self, sandbox_id: str) -> Machine:
        """Returns the machine of a running sandbox. :raises NotFound: :raises InvalidState: it is not running."""
        entry = self._entry(sandbox_id)
        if entry.machine is None or entry.record.state is not State.RUNNING:
            why = f": {entry.record.error}" if entry.record.error else ""
            hint = "; resume it first" if entry.record.state in (State.PAUSED, State.SUSPENDED) else ""
            raise InvalidState(
                f"sandbox {sandbox_id} is {entry.record.state}, not running{why}{hint}", reason="SANDBOX_NOT_RUNNING"
            )
        return entry.machine

    def console(self, sandbox_id: str, limit_bytes: int) -> bytes:
        """Returns the last console bytes, of a failed sandbox, too."""
        entry = self._entry(sandbox_id)
        return b"" if entry.machine is None else entry.machine.vm.console_tail(limit_bytes)

    async def ca_certificate(self, sandbox_id: str) -> str:
        """Returns the certificate (PEM) of the CA that the sandbox's guest trusts; "" without one. :raises NotFound:"""
        return await self._host.network.ca_certificate(self._entry(sandbox_id).record)

    async def count_drops(self) -> None:
        """Counts, for ever, what the kernel dropped of running sandboxes."""
        await drop_counters.keep_counting(
            self._host.network, lambda: [entry.record for entry in self._entries.values() if entry.runs]
        )

    async def fresh(self, sandbox_id: str) -> Record:
        """As `get`, with what the kernel dropped until now."""
        entry = self._entry(sandbox_id)
        if entry.runs:
            await drop_counters.count(self._host.network, entry.record)
        return self.get(sandbox_id)

    # -- telling -------------------------------------------------------------------------------------------------------

    def _publish(self, kind: EventType, entry: Entry, reason: str = "") -> None:
        self.admission.poke()
        counts = dict.fromkeys(State, 0)
        for other in self._entries.values():
            counts[other.record.state] += 1
        for state, count in counts.items():
            SANDBOXES.labels(state.value).set(count)
        self._events.publish(kind, entry.record, reason)

    def on_denial(self, record: Record, denial: Denial) -> None:
        """Tells watchers what a sandbox was not let do."""
        self._events.publish_denial(record, denial)
