"""What the manager has in memory of one sandbox."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from agent.model import State
from agent.sandbox.machine import Machine
from agent.sandbox.record import Record


@dataclass(eq=False, slots=True)
class Entry:
    """A sandbox in memory. `creating` and `deleting` are the tasks that do so, for everyone to await."""

    record: Record
    machine: Machine | None = None
    creating: asyncio.Task[None] | None = None
    deleting: asyncio.Task[None] | None = None
    monitor: asyncio.Task[None] | None = None
    expiry: asyncio.TimerHandle | None = None
    half_removed: bool = False
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # the template of an adopted one

    @property
    def runs(self) -> bool:
        """Whether it is running and to go on."""
        return self.record.state is State.RUNNING and self.deleting is None
