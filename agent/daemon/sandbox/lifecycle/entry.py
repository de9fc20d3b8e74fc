"""In-memory entry of one sandbox: record, machine and tasks."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any

from agent.common.model import State
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.state.record import Record


@dataclass(eq=False, slots=True)
class Entry:
    """A sandbox in memory.

    :param creating: the task that creates the sandbox; any number of callers await it. `deleting` likewise.
    :param monitor: the task that notices the end of the VM or of the link.
    :param working: tasks that change the sandbox, `creating` among them; see `operations`.
    :param needs_cleanup: its host resources must be removed by id, since no machine owns all of them.
    :param changing: lock for changes, one at a time.
    :param cleanup_stack: unpins the template of an adopted sandbox.
    """

    record: Record
    machine: Machine | None = None
    creating: asyncio.Task[None] | None = None
    deleting: asyncio.Task[None] | None = None
    monitor: asyncio.Task[None] | None = None
    working: set[asyncio.Task[Any]] = field(default_factory=set)
    needs_cleanup: bool = False
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    cleanup_stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def runs(self) -> bool:
        """Whether the sandbox is running and not being deleted."""
        return self.record.state is State.RUNNING and self.deleting is None
