"""Emptying a node: it takes no more sandboxes, and those that it has end, or are ended at a deadline. Reversible."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from agent.common import stored_json
from agent.common.aio import run_to_completion
from agent.common.background import QUICK, BackgroundLoop, Supervisor
from agent.common.errors import AgentError
from agent.common.telemetry import DRAINING, log
from agent.daemon.sandbox.capacity.node import Node
from agent.daemon.sandbox.lifecycle.expiry import uptime
from agent.daemon.sandbox.state.store import Store

_FACT = "drain"
_LOOK_S = 0.25


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a drain has come: sandboxes that are left, and seconds until they are deleted (None: never)."""

    remaining: int
    evict_in_s: float | None


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the next agent is told of a drain; `evict_at` is by `uptime`, None: never."""

    evict_at: float | None


class Drain:
    """At most one drain of a node at a time; it outlives the agent.

    :param left: returns how many sandboxes there are. :param evict: deletes all of them.
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
        self._evict_at: float | None = None  # by `uptime`
        self._supervisor = supervisor
        self._eviction: BackgroundLoop | None = None
        self._changing = asyncio.Lock()

    async def begin(self, evict_after_s: float | None, *, why: str = "it is drained", keep: bool = True) -> None:
        """Begin a drain, or change its deadline; a caller that leaves does not stop it half-way.

        :param keep: also for the next agent.
        :raises HostError: it cannot be stored; the node drains no more than before.
        """
        await run_to_completion(self._begin(evict_after_s, why, keep=keep))

    async def _begin(self, evict_after_s: float | None, why: str, *, keep: bool) -> None:
        async with self._changing:
            evict_at = None if evict_after_s is None else uptime() + evict_after_s
            if keep:
                await self._store.set_fact(_FACT, stored_json.encode(_Kept(evict_at)))
            self._set(why, evict_at)
        log.info("draining", sandboxes=self._left(), evict_after_s=evict_after_s)

    async def end(self) -> None:
        """Take sandboxes again; a caller that leaves does not stop it half-way. Idempotent.

        :raises HostError: it cannot be stored; the node drains on.
        """
        await run_to_completion(self._end())

    async def _end(self) -> None:
        async with self._changing:
            await self._store.set_fact(_FACT, "")
            self._evict_at = None
            self._node.set_draining("")
            DRAINING.set(0)
        log.info("not draining")

    def restore(self) -> None:
        """Goes on with what an earlier agent was told; on another boot of the host, without its deadline."""
        if text := self._store.facts.get(_FACT):
            try:
                evict_at = stored_json.decode(text, _Kept).evict_at
            except ValueError as error:
                log.error("the drain's deadline is damaged: it goes on without one", error=str(error))
                evict_at = None
            self._set("it is drained", None if self._store.rebooted else evict_at)

    def _set(self, why: str, evict_at: float | None) -> None:
        self._node.set_draining(why)
        DRAINING.set(1)
        self._evict_at = evict_at
        if evict_at is not None and self._eviction is None:
            self._eviction = self._supervisor.start("eviction", self._evict_when_due, QUICK)

    async def _evict_when_due(self) -> None:
        """Evict from the deadline on until no sandbox is left; a deadline that is changed or lifted counts at once."""
        while True:
            if self._evict_at is not None and uptime() >= self._evict_at and self._left():
                try:
                    await self._evict()
                except AgentError as error:
                    log.error("cannot evict", error=error.message)
            await asyncio.sleep(_LOOK_S)

    async def progress(self) -> AsyncIterator[Progress]:
        """Yields how far it has come, on every change, until no sandbox is left or the drain is ended."""
        last = None
        while self._node.draining:
            left, evict_at = self._left(), self._evict_at
            now = Progress(left, None if evict_at is None or not left else max(0.0, evict_at - uptime()))
            if last is None or now.remaining != last.remaining:
                yield now
                last = now
            if not now.remaining:
                return
            await asyncio.sleep(_LOOK_S)

    async def aclose(self) -> None:
        """Stops waiting for the deadline. Idempotent."""
        self._evict_at = None
        if self._eviction is not None:
            await self._eviction.stop()
            self._eviction = None
