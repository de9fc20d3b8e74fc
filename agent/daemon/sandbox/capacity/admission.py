"""Admission of new sandboxes: room on the node, the tenant's quota, memory pressure, and the queue for room."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from agent.common.config.daemon import NodeSettings
from agent.common.errors import NodeDraining, ResourceExhausted
from agent.common.model import SandboxSpec
from agent.common.telemetry import QUEUED, REFUSED, step
from agent.daemon.sandbox.capacity.node import Node
from agent.daemon.sandbox.capacity.quotas import Quotas

_RECHECK_S = 0.5  # interval while waiting: memory pressure has no notification
_PRESSURE = Path("/proc/pressure/memory")


def memory_pressure() -> float:
    """Return PSI memory "full avg10": the percentage of the last 10 s in which all tasks waited; 0 if unknown.

    Source: the kernel's Documentation/accounting/psi.rst.
    """
    try:
        for line in _PRESSURE.read_text().splitlines():
            if line.startswith("full "):
                return float(line.split("avg10=")[1].split()[0])
    except (OSError, ValueError, IndexError):
        pass
    return 0.0


class Admission:
    """Admits sandboxes to the node, in order of arrival.

    :param reserved: returns the specifications of the sandboxes that occupy CPU and memory.
    """

    def __init__(self, settings: NodeSettings, node: Node, reserved: Callable[[], Sequence[SandboxSpec]]) -> None:
        self._settings = settings
        self._node = node
        self._reserved = reserved
        self._quotas = Quotas(settings.quotas)
        self._admitted: list[SandboxSpec] = []  # and not in `reserved` yet
        self._queue: deque[asyncio.Event] = deque()

    def reconfigure(self, settings: NodeSettings) -> None:
        """Apply other limits to new sandboxes; present ones stay."""
        self._settings = settings
        self._quotas = Quotas(settings.quotas)
        self.wake_first()

    def check(self, wanted: Sequence[SandboxSpec]) -> None:
        """Check that sandboxes of one tenant fit on this node now.

        :raises ResourceExhausted: they do not fit (NODE_FULL, TENANT_QUOTA); the message lists what is short.
        :raises NodeDraining: the node admits no sandboxes.
        """
        if self._node.draining:
            raise NodeDraining(f"this node takes no sandboxes ({self._node.draining}); try another")
        reserved = [*self._reserved(), *self._admitted]
        self._quotas.check(wanted, reserved)
        lacking = self._node.lacking(wanted, reserved)
        pressure = memory_pressure()
        if 0 < self._settings.max_memory_pressure < pressure:
            lacking.append(f"memory: everything waited for it for {pressure:g} % of the last 10 s")
        if lacking:
            raise ResourceExhausted(
                f"this node has no room ({'; '.join(lacking)}); delete sandboxes or try another node",
                reason="NODE_FULL",
            )

    @asynccontextmanager
    async def room(
        self, wanted: Sequence[SandboxSpec], unless: Callable[[], bool] = lambda: False
    ) -> AsyncIterator[None]:
        """Reserve room for sandboxes of one tenant during the body; wait in the queue for it if necessary.

        :param unless: returns True once no room is needed any more.
        :raises ResourceExhausted: no room within `node.queue_timeout_s`, the queue is full, or the quota is exceeded.
        :raises NodeDraining: the node admits no sandboxes.
        """
        try:
            await self._admit(wanted, unless)
        except ResourceExhausted as error:
            REFUSED.labels(error.reason).inc()
            raise
        with self._reserve(wanted):
            yield

    async def _admit(self, wanted: Sequence[SandboxSpec], unless: Callable[[], bool]) -> None:
        if self._has_room(wanted) and not self._queue:
            return
        if len(self._queue) >= self._settings.queue_length:
            self.check(wanted)  # raises an error that lists what is short
            raise self._queue_full(len(self._queue))
        await self._wait(wanted, unless)

    def _has_room(self, wanted: Sequence[SandboxSpec]) -> bool:
        """Return whether there is room now.

        :raises ResourceExhausted: waiting would not help: the tenant's quota is exceeded.
        :raises NodeDraining: the node admits no sandboxes.
        """
        try:
            self.check(wanted)
        except ResourceExhausted as error:
            # A tenant frees its own quota, and a draining node gives no room.
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
                            await asyncio.wait_for(turn.wait(), _RECHECK_S)
                        turn.clear()
        except TimeoutError:
            self.check(wanted)  # raises an error that lists what is short
            raise self._queue_full(len(self._queue) - 1) from None
        finally:
            self._queue.remove(turn)
            QUEUED.set(len(self._queue))
            self.wake_first()

    @staticmethod
    def _queue_full(waiting: int) -> ResourceExhausted:
        return ResourceExhausted(f"{waiting} creates wait for room on this node; try another", reason="NODE_FULL")

    @contextlib.contextmanager
    def _reserve(self, wanted: Sequence[SandboxSpec]) -> Iterator[None]:
        self._admitted += wanted
        try:
            yield
        finally:
            for spec in wanted:
                self._admitted.remove(spec)

    def wake_first(self) -> None:
        """Let the first in the queue check again; for a change of sandboxes, which may have freed resources."""
        if self._queue:
            self._queue[0].set()
