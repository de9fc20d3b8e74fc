"""Events of sandboxes for watchers. A watcher that is too slow gets an error; it never slows the node."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from agent.common.errors import AgentError
from agent.common.policy.reasons import Denial
from agent.daemon.sandbox.state.record import Record

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_QUEUED = 1024
# A guest can cause any number of denials: they must not displace other events from the queue.
_MAX_QUEUED_DENIALS = 256


class WatcherTooSlowError(AgentError):
    """The watcher did not read its events in time, and must watch again from a new snapshot."""

    default_reason = "WATCHER_TOO_SLOW"


class EventType(StrEnum):
    """Kind of an event. SNAPSHOT: a sandbox present at the start; SYNCED: all of these were sent."""

    SNAPSHOT = "snapshot"
    CREATED = "created"
    UPDATED = "updated"
    DELETED = "deleted"
    SYNCED = "synced"
    DENIED = "denied"


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    :param record: copy of the sandbox's record; None in SYNCED only.
    :param time: seconds since 1970.
    :param denial: set in DENIED only.
    """

    type: EventType
    record: Record | None
    time: float
    reason: str = ""
    denial: Denial | None = None


class _Watcher:
    def __init__(self, wanted: Callable[[Record], bool]) -> None:
        self.wanted = wanted
        self.queue: asyncio.Queue[Event] = asyncio.Queue(_MAX_QUEUED)
        self.too_slow = False


class Events:
    """Distributes events to all watchers; nothing here waits."""

    def __init__(self) -> None:
        self._watchers: set[_Watcher] = set()

    def publish(self, kind: EventType, record: Record, reason: str = "") -> None:
        """Queue an event for each watcher that wants this sandbox."""
        event = Event(kind, record.copy(), time.time(), reason)
        for watcher in self._watchers:
            if watcher.wanted(record):
                try:
                    watcher.queue.put_nowait(event)
                except asyncio.QueueFull:
                    watcher.too_slow = True

    def publish_denial(self, record: Record, denial: Denial) -> None:
        """Queue a denial for each watcher that wants this sandbox; drop it where too many events wait already."""
        event = Event(EventType.DENIED, record.copy(), time.time(), denial.reason.value, denial)
        for watcher in self._watchers:
            if watcher.wanted(record) and watcher.queue.qsize() < _MAX_QUEUED_DENIALS:
                watcher.queue.put_nowait(event)

    async def watch(self, present: Iterable[Record], wanted: Callable[[Record], bool]) -> AsyncIterator[Event]:
        """Yield a SNAPSHOT of each present sandbox, SYNCED, then every event.

        :param wanted: returns whether the watcher wants the events of a sandbox.
        :raises WatcherTooSlowError: events were lost, since the watcher did not read them in time.
        """
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
