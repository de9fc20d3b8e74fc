"""Expiry of sandboxes: at a time of day, after a duration, with their lease, or when idle.

Durations are measured by the clock since the host's boot, sleep included: setting the host's time of day shortens or
prolongs none of them. The time of day that callers see follows that clock.
"""

from __future__ import annotations

import asyncio
import time

from agent.common.clock import uptime_s
from agent.common.errors import AgentError
from agent.common.model import State
from agent.common.telemetry import log
from agent.daemon.sandbox.lifecycle.delete import Deleter
from agent.daemon.sandbox.lifecycle.registry import SandboxEntry, SandboxRegistry
from agent.daemon.sandbox.state.events import EventType
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.store import Store

_CHECK_INTERVAL_S = 0.25  # sandboxes end within a second of their time
_MIN_CLOCK_JUMP_S = 0.2


def live_for(record: Record, seconds: float) -> None:
    """Let a sandbox expire in so many seconds from now."""
    record.expire_uptime = uptime_s() + seconds
    record.expire_time = time.time() + seconds


def live_until(record: Record, moment: float | None) -> None:
    """Let a sandbox expire at a time of day, in seconds since 1970; None: never."""
    record.expire_uptime = None
    record.expire_time = moment


def after_reboot(record: Record) -> None:
    """Convert the expiry of a sandbox to the clock of this boot of the host, by its time of day."""
    if record.expire_uptime is not None and record.expire_time is not None:
        record.expire_uptime = uptime_s() + record.expire_time - time.time()


def expiry_reason(entry: SandboxEntry) -> str:
    """Return why a sandbox is to be deleted now; "" while it may live on."""
    record, lifetime = entry.record, entry.record.spec.lifetime
    if lifetime.lease_s is not None and record.state is State.CREATING:
        return ""  # a lease cannot be renewed before its sandbox runs
    if record.expire_uptime is not None:
        over = uptime_s() >= record.expire_uptime
    else:
        over = record.expire_time is not None and time.time() >= record.expire_time
    if over:
        return "expired" if lifetime.lease_s is None else "lease lapsed"
    if lifetime.idle_s is None or not entry.runs or entry.machine is None:
        return ""
    return "idle" if entry.machine.idle_s() >= lifetime.idle_s else ""


class Expiry:
    """Deletes sandboxes when they expire."""

    def __init__(self, store: Store, registry: SandboxRegistry, deleter: Deleter) -> None:
        self._store = store
        self._registry = registry
        self._deleter = deleter

    async def run(self) -> None:
        """Check all sandboxes four times a second, until cancelled. Stateless, so that it can be started again.

        :raises ExceptionGroup: unexpected errors of some sandboxes; all others were checked.
        """
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            failures = []
            jump_s = 0.0
            for entry in self._registry.entries():
                if entry.operations.deleting:
                    continue
                try:
                    jump_s = await self._follow_clock(entry) or jump_s
                    if not entry.operations.deleting and (reason := expiry_reason(entry)):
                        self._deleter.start(entry, reason)
                except Exception as error:  # noqa: BLE001  raised below
                    failures.append(error)
            if jump_s:
                log.warning("the host's clock was set", seconds=round(jump_s, 3))
            if failures:
                raise ExceptionGroup("sandboxes cannot be ended", failures)

    async def _follow_clock(self, entry: SandboxEntry) -> float:
        """Adapt the time of day of a sandbox's expiry after the host's clock was set; return the jump in seconds."""
        record = entry.record
        if record.expire_uptime is None or record.expire_time is None:
            return 0.0
        expire_time = record.expire_uptime + time.time() - uptime_s()
        jump_s = expire_time - record.expire_time
        if abs(jump_s) <= _MIN_CLOCK_JUMP_S:
            return 0.0
        record.expire_time = expire_time
        self._registry.publish(EventType.UPDATED, entry)
        try:
            await self._store.put(record)
        except AgentError as error:
            log.error("cannot store when a sandbox expires", sandbox_id=record.id, error=error.message)
        return jump_s
