"""Tells watchers what happens to sandboxes. One that does not keep up is told so and ended; it never slows the node."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from agent.errors import AgentError
from agent.sandbox.record import Record

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_QUEUED = 1024


class WatcherTooSlowError(AgentError):
    """The watcher did not read its events; it must begin again with a new snapshot."""

    default_reason = "WATCHER_TOO_SLOW"


class EventType(StrEnum):
    """What happened to a sandbox."""

    SNAPSHOT = "snapshot"
    CREATED = "created"
    UPDATED = "updated"
    DELETED = "deleted"
    SYNCED = "synced"


@dataclass(frozen=True, slots=True)
class Event:
    """One event; `record` is a snapshot, None only in SYNCED."""

    type: EventType
    record: Record | None
    time: float
    reason: str = ""


class _Watcher:
    def __init__(self, wanted: Callable[[Record], bool]) -> None:
        self.wanted = wanted
        self.queue: asyncio.Queue[Event] = asyncio.Queue(_MAX_QUEUED)
        self.too_slow = False


class Events:
    """Distributes events to watchers."""

    def __init__(self) -> None:
        self._watchers: set[_Watcher] = set()

    def publish(self, kind: EventType, record: Record, reason: str = "") -> None:
        """Queues an event for every watcher that wants this sandbox. Never blocks."""
        event = Event(kind, record.copy(), time.time(), reason)
        for watcher in self._watchers:
            if watcher.wanted(record):
                try:
                    watcher.queue.put_nowait(event)
                except asyncio.QueueFull:
                    watcher.too_slow = True

    async def watch(self, present: Iterable[Record], wanted: Callable[[Record], bool]) -> AsyncIterator[Event]:
        """Yields a SNAPSHOT of each present sandbox, SYNCED, then every event. :raises WatcherTooSlowError:"""
        with self._registered(wanted) as watcher:
            now = time.time()
            for record in [record.copy() for record in present if wanted(record)]:
                yield Event(EventType.SNAPSHOT, record, now)
            yield Event(EventType.SYNCED, None, now)
            while True:
                if watcher.too_slow and watcher.queue.empty():
                    raise WatcherTooSlowError("events were lost because they were not read in time; watch again")
                yield await watcher.queue.get()

    @contextmanager
    def _registered(self, wanted: Callable[[Record], bool]) -> Iterator[_Watcher]:
        watcher = _Watcher(wanted)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
