"""Drain of a node: no sandbox is admitted, and those left at a deadline are evicted. Reversible."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from agent.common import stored_json
from agent.common.aio import run_to_completion
from agent.common.background import QUICK, BackgroundLoop, Supervisor
from agent.common.clock import uptime_s
from agent.common.errors import AgentError
from agent.common.telemetry import DRAINING, log
from agent.daemon.sandbox.capacity.node import Node
from agent.daemon.sandbox.state.store import Store

_FACT = "drain"
_CHECK_INTERVAL_S = 0.25


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a drain.

    :param remaining: number of sandboxes left.
    :param evict_in_s: seconds until these are evicted; None: never.
    """

    remaining: int
    evict_in_s: float | None


@dataclass(frozen=True, slots=True)
class _StoredDrain:
    """Drain as stored for the next agent.

    :param evict_at: deadline by `uptime_s`; None: no deadline.
    """

    evict_at: float | None


class Drain:
    """Starts, ends and restores the drain of this node; a drain outlives the agent.

    :param left: returns the number of sandboxes on the node.
    :param evict: deletes all of them.
    """

    def __init__(
        self,
        node: Node,
        store: Store,
        left: Callable[[], int],
        evict: Callable[[], Coroutine[Any, Any, None]],
        supervisor: Supervisor,
    ) -> None:
        self._node = node
        self._store = store
        self._left = left
        self._evict = evict
        self._evict_at: float | None = None  # by `uptime_s`
        self._supervisor = supervisor
        self._eviction: BackgroundLoop | None = None
        self._changing = asyncio.Lock()

    async def begin(self, evict_after_s: float | None, *, why: str = "it is drained", keep: bool = True) -> None:
        """Begin a drain, or change its deadline. Cancelling the caller does not stop it half-way.

        :param evict_after_s: seconds until the sandboxes left are evicted; None: never.
        :param why: reason in errors of refused creates.
        :param keep: store the drain for the next agent.
        :raises HostError: the write failed; nothing has changed.
        """
        await run_to_completion(self._begin(evict_after_s, why, keep=keep))

    async def _begin(self, evict_after_s: float | None, why: str, *, keep: bool) -> None:
        async with self._changing:
            evict_at = None if evict_after_s is None else uptime_s() + evict_after_s
            if keep:
                await self._store.set_fact(_FACT, stored_json.encode(_StoredDrain(evict_at)))
            self._set(why, evict_at)
        log.info("draining", sandboxes=self._left(), evict_after_s=evict_after_s)

    async def end(self) -> None:
        """End the drain and admit sandboxes again. Idempotent. Cancelling the caller does not stop it half-way.

        :raises HostError: the write failed; the drain goes on.
        """
        await run_to_completion(self._end())

    async def _end(self) -> None:
        async with self._changing:
            await self._store.set_fact(_FACT, "")
            self._evict_at = None
            self._node.set_draining("")
            DRAINING.set(0)
        log.info("drain ended")

    def restore(self) -> None:
        """Resume the drain that an earlier agent stored; after a reboot of the host, without its deadline."""
        if text := self._store.facts.get(_FACT):
            try:
                evict_at = stored_json.decode(text, _StoredDrain).evict_at
            except ValueError as error:
                log.error(
                    "the stored deadline of the drain is damaged: the drain goes on without one", error=str(error)
                )
                evict_at = None
            self._set("it is drained", None if self._store.rebooted else evict_at)

    def _set(self, why: str, evict_at: float | None) -> None:
        self._node.set_draining(why)
        DRAINING.set(1)
        self._evict_at = evict_at
        if evict_at is not None and self._eviction is None:
            self._eviction = self._supervisor.start("eviction", self._evict_when_due, QUICK)

    async def _evict_when_due(self) -> None:
        """Evict all sandboxes once the deadline has passed, until stopped; a changed deadline applies at once."""
        while True:
            if self._evict_at is not None and uptime_s() >= self._evict_at and self._left():
                try:
                    await self._evict()
                except AgentError as error:
                    log.error("cannot evict", error=error.message)
            await asyncio.sleep(_CHECK_INTERVAL_S)

    async def progress(self) -> AsyncIterator[Progress]:
        """Yield the progress now and at each change, until no sandbox is left or the drain is ended."""
        last = None
        while self._node.draining:
            left, evict_at = self._left(), self._evict_at
            now = Progress(left, None if evict_at is None or not left else max(0.0, evict_at - uptime_s()))
            if last is None or now.remaining != last.remaining:
                yield now
                last = now
            if not now.remaining:
                return
            await asyncio.sleep(_CHECK_INTERVAL_S)

    async def aclose(self) -> None:
        """Stop waiting for the deadline. Idempotent."""
        self._evict_at = None
        if self._eviction is not None:
            await self._eviction.stop()
            self._eviction = None
