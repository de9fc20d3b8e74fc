"""Whether there is room for a sandbox: on the node, in its tenant's quota; and who waits for some."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from agent.common.config.daemon import NodeSettings
from agent.common.config.quota import Quota
from agent.common.errors import NodeDraining, ResourceExhausted
from agent.common.model import SandboxSpec
from agent.common.telemetry import QUEUED, REFUSED, step
from agent.daemon.sandbox.capacity.node import Node

_LOOK_S = 0.5  # at pressure, which nobody tells of
_PRESSURE = Path("/proc/pressure/memory")
ANYONE = "*"


def memory_pressure() -> float:
    """Returns for how many percent of the last 10 s everything waited for memory (PSI, "full avg10"); 0 if unknown."""
    try:
        for line in _PRESSURE.read_text().splitlines():
            if line.startswith("full "):
                return float(line.split("avg10=")[1].split()[0])
    except (OSError, ValueError, IndexError):
        pass
    return 0.0


class Admission:
    """Lets sandboxes in. :param held: returns those that are there, with those that are being made."""

    def __init__(self, settings: NodeSettings, node: Node, held: Callable[[], Sequence[SandboxSpec]]) -> None:
        self._settings = settings
        self._node = node
        self._held = held
        self._quotas = {name: Quota.parse(text) for name, text in settings.quotas.items()}
        self._coming: list[SandboxSpec] = []  # let in, and not yet among those that are there
        self._queue: deque[asyncio.Event] = deque()

    def reconfigure(self, settings: NodeSettings) -> None:
        """Takes other limits from now on; what is there stays."""
        self._settings = settings
        self._quotas = {name: Quota.parse(text) for name, text in settings.quotas.items()}
        self.poke()

    def check(self, wanted: Sequence[SandboxSpec]) -> None:
        """:raises ResourceExhausted: they do not fit; the message says what lacks. :raises NodeDraining:"""
        if self._node.draining:
            raise NodeDraining(f"this node takes no sandboxes ({self._node.draining}); try another")
        held = [*self._held(), *self._coming]
        self._check_quota(wanted, held)
        lacking = self._node.lacking(wanted, held)
        pressure = memory_pressure()
        if 0 < self._settings.max_memory_pressure < pressure:
            lacking.append(f"memory: everything waited for it for {pressure:g} % of the last 10 s")
        if lacking:
            raise ResourceExhausted(
                f"this node has no room ({'; '.join(lacking)}); delete sandboxes or try another node",
                reason="NODE_FULL",
            )

    def _check_quota(self, wanted: Sequence[SandboxSpec], held: Sequence[SandboxSpec]) -> None:
        tenant = wanted[0].net.tenant
        quota = self._quotas.get(tenant, self._quotas.get(ANYONE))
        if quota is None:
            return
        lacking = quota.lacking([*(spec for spec in held if spec.net.tenant == tenant), *wanted])
        if lacking:
            raise ResourceExhausted(
                f"tenant {tenant!r} would exceed its quota ({'; '.join(lacking)}); delete sandboxes of it",
                reason="TENANT_QUOTA",
            )

    @asynccontextmanager
    async def room(
        self, wanted: Sequence[SandboxSpec], unless: Callable[[], bool] = lambda: False
    ) -> AsyncIterator[None]:
        """Holds room for sandboxes; while there is none, waits for it in order of arrival, for so long as is allowed.

        :param unless: whether none is needed any more.
        :raises ResourceExhausted: there is none, or none came in time. :raises NodeDraining:
        """
        try:
            await self._let_in(wanted, unless)
        except ResourceExhausted as error:
            REFUSED.labels(error.reason).inc()
            raise
        with self._held_for(wanted):
            yield

    async def _let_in(self, wanted: Sequence[SandboxSpec], unless: Callable[[], bool]) -> None:
        if self._has_room(wanted) and not self._queue:
            return
        if len(self._queue) >= self._settings.queue_length:
            self.check(wanted)  # which says what lacks
            raise self._crowded(len(self._queue))
        await self._wait(wanted, unless)

    def _has_room(self, wanted: Sequence[SandboxSpec]) -> bool:
        """Whether there is room. :raises ResourceExhausted: waiting would not help. :raises NodeDraining:"""
        try:
            self.check(wanted)
        except ResourceExhausted as error:
            # A quota is its tenant's own affair, and a node that drains has no room to give.
            if error.reason != "NODE_FULL":
                raise
            return False
        return True

    async def _wait(self, wanted: Sequence[SandboxSpec], unless: Callable[[], bool]) -> None:
        turn = asyncio.Event()
        self._queue.append(turn)
        QUEUED.set(len(self._queue))
        try:
            with step("queue"):
                async with asyncio.timeout(self._settings.queue_timeout_s):
                    while not unless() and (self._queue[0] is not turn or not self._has_room(wanted)):
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(turn.wait(), _LOOK_S)
                        turn.clear()
        except TimeoutError:
            self.check(wanted)  # which says what lacks
            raise self._crowded(len(self._queue) - 1) from None
        finally:
            self._queue.remove(turn)
            QUEUED.set(len(self._queue))
            self.poke()

    @staticmethod
    def _crowded(waiting: int) -> ResourceExhausted:
        return ResourceExhausted(f"{waiting} creates wait for room on this node; try another", reason="NODE_FULL")

    @contextlib.contextmanager
    def _held_for(self, wanted: Sequence[SandboxSpec]) -> Iterator[None]:
        self._coming += wanted
        try:
            yield
        finally:
            for spec in wanted:
                self._coming.remove(spec)

    def poke(self) -> None:
        """Has the first who waits look again: something may have been freed."""
        if self._queue:
            self._queue[0].set()
