"""What the manager has in memory of one sandbox."""

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
    """A sandbox in memory. `creating` and `deleting` are the tasks that do so, for everyone to await.

    :param working: tasks that change it, `creating` among them; see `agent.daemon.sandbox.lifecycle.operations`.

    :param changing: held by the one operation that changes it.

    :param needs_cleanup: what it has on the host must be looked for by its name: no machine knows all of it.
    """

    record: Record
    machine: Machine | None = None
    creating: asyncio.Task[None] | None = None
    deleting: asyncio.Task[None] | None = None
    monitor: asyncio.Task[None] | None = None
    working: set[asyncio.Task[Any]] = field(default_factory=set)
    needs_cleanup: bool = False
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    cleanup_stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # the template of an adopted one

    @property
    def runs(self) -> bool:
        """Whether it is running and to go on."""
        return self.record.state is State.RUNNING and self.deleting is None
