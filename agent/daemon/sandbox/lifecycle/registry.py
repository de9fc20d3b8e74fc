"""Registry of the sandboxes on this node: lookup by id and by request_id, and change notifications."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from agent.common.errors import InvalidSpec, InvalidState, NotFound
from agent.common.model import SandboxSpec, State, is_sandbox_id
from agent.common.telemetry import SANDBOXES
from agent.daemon.sandbox.lifecycle.operations import Operations
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.state.events import Event, Events, EventType
from agent.daemon.sandbox.state.record import Record

# States without CPU and memory: a suspended sandbox is admitted again when it is resumed.
_NO_RESOURCES = frozenset({State.LOST, State.FAILED, State.SUSPENDED, State.DELETED})


@dataclass(eq=False, slots=True)
class SandboxEntry:
    """A sandbox in memory.

    :param needs_cleanup: its host resources must be removed by id, since no machine owns all of them.
    :param operations: its tasks and its lock.
    :param cleanup_stack: unpins the template of an adopted sandbox.
    """

    record: Record
    machine: Machine | None = None
    needs_cleanup: bool = False
    operations: Operations = field(init=False)
    cleanup_stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        self.operations = Operations(self.record.id)

    @property
    def runs(self) -> bool:
        """Whether the sandbox is running and not being deleted."""
        return self.record.state is State.RUNNING and not self.operations.deleting


class SandboxRegistry:
    """All sandboxes of this node. `on_change` has callbacks for every published change."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._entries: dict[str, SandboxEntry] = {}
        self._by_request: dict[str, SandboxEntry] = {}
        self.on_change: set[Callable[[], None]] = set()

    def __len__(self) -> int:
        """Return the number of sandboxes, in whatever state."""
        return len(self._entries)

    # -- lookup --------------------------------------------------------------------------------------------------------

    def entry(self, sandbox_id: str) -> SandboxEntry:
        """Return the entry of a sandbox.

        :raises InvalidSpec: malformed id.
        :raises NotFound: the node has no such sandbox.
        """
        entry = self._entries.get(sandbox_id)
        if entry is None:
            if not is_sandbox_id(sandbox_id):
                raise InvalidSpec(f"{sandbox_id[:80]!r} is not a sandbox id; ids look like sbx-0123456789abcdef")
            raise NotFound(
                f"no sandbox {sandbox_id} on this node; it may have expired: list the sandboxes to see which there are",
                reason="SANDBOX_NOT_FOUND",
            )
        return entry

    def by_request(self, request_id: str) -> SandboxEntry | None:
        """Return the sandbox that a create with this request_id made; None for an unknown or empty one."""
        return self._by_request.get(request_id)

    def entries(self) -> list[SandboxEntry]:
        """Return all entries, oldest first."""
        return list(self._entries.values())

    def get(self, sandbox_id: str) -> Record:
        """Return a copy of a sandbox's record.

        :raises InvalidSpec: malformed id.
        :raises NotFound: the node has no such sandbox.
        """
        return self.entry(sandbox_id).record.copy()

    def list(self) -> list[Record]:
        """Return copies of all records, by create time."""
        records = [entry.record.copy() for entry in self._entries.values()]
        return sorted(records, key=lambda record: (record.create_time, record.id))

    def running(self, sandbox_id: str) -> Machine:
        """Return the machine of a running sandbox.

        :raises InvalidSpec: malformed id.
        :raises NotFound: the node has no such sandbox.
        :raises InvalidState: the sandbox is not running.
        """
        entry = self.entry(sandbox_id)
        if entry.machine is None or entry.record.state is not State.RUNNING:
            why = f": {entry.record.error}" if entry.record.error else ""
            hint = "; resume it first" if entry.record.state in (State.PAUSED, State.SUSPENDED) else ""
            raise InvalidState(
                f"sandbox {sandbox_id} is {entry.record.state}, not running{why}{hint}", reason="SANDBOX_NOT_RUNNING"
            )
        return entry.machine

    def reserved(self) -> Sequence[SandboxSpec]:
        """Return the specifications of all sandboxes that occupy CPU and memory, or are about to."""
        return [entry.record.spec for entry in self._entries.values() if entry.record.state not in _NO_RESOURCES]

    # -- changes -------------------------------------------------------------------------------------------------------

    def add(self, entry: SandboxEntry) -> None:
        """Add a sandbox, under its request_id as well."""
        self._entries[entry.record.id] = entry
        if entry.record.spec.request_id:
            self._by_request[entry.record.spec.request_id] = entry

    def remove(self, entry: SandboxEntry) -> None:
        """Remove a sandbox. Idempotent."""
        self._entries.pop(entry.record.id, None)
        if self._by_request.get(entry.record.spec.request_id) is entry:
            del self._by_request[entry.record.spec.request_id]

    def clear(self) -> None:
        """Remove all sandboxes, of an agent that leaves them to the next one."""
        self._entries.clear()
        self._by_request.clear()

    def publish(self, kind: EventType, entry: SandboxEntry, reason: str = "") -> None:
        """Notify watchers and `on_change` of a change, and update the gauge of sandboxes by state."""
        for notify in self.on_change:
            notify()
        counts = dict.fromkeys(State, 0)
        for other in self._entries.values():
            counts[other.record.state] += 1
        for state, count in counts.items():
            SANDBOXES.labels(state.value).set(count)
        self._events.publish(kind, entry.record, reason)

    def watch(self, wanted: Callable[[Record], bool]) -> AsyncIterator[Event]:
        """Yield the present sandboxes, then every change; see `Events.watch`."""
        return self._events.watch(self.list(), wanted)
