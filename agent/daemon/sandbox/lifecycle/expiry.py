"""When sandboxes end by themselves: at a time of day, after a time, with their lease, when nobody uses them.

What is to last for a time is measured by the clock that counts since the host's boot, its sleep included
(CLOCK_BOOTTIME, clock_gettime(2)): setting the host's clock shortens or prolongs no life. The time of day that callers
see follows it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

from agent.common.errors import AgentError
from agent.common.model import State
from agent.common.telemetry import log
from agent.daemon.sandbox.lifecycle.entry import Entry
from agent.daemon.sandbox.state.record import Record

_SWEEP_S = 0.25  # ends are promised to the second
_JUMP_S = 0.2


def uptime() -> float:
    """Returns the seconds since the host's boot, those of its sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def live_for(record: Record, seconds: float) -> None:
    """Makes a sandbox end in so many seconds from now."""
    record.expire_uptime = uptime() + seconds
    record.expire_time = time.time() + seconds


def live_until(record: Record, moment: float | None) -> None:
    """Makes a sandbox end at a time of day (seconds since 1970), or never."""
    record.expire_uptime = None
    record.expire_time = moment


def after_reboot(record: Record) -> None:
    """Sets the end of a sandbox by the clock of this boot of the host: what time of day it would be."""
    if record.expire_uptime is not None and record.expire_time is not None:
        record.expire_uptime = uptime() + record.expire_time - time.time()


def why_over(entry: Entry) -> str:
    """Returns why a sandbox is to end now, or ""."""
    record, lifetime = entry.record, entry.record.spec.lifetime
    if lifetime.lease_s is not None and record.state is State.CREATING:
        return ""  # nobody can renew it yet
    if record.expire_uptime is not None:
        over = uptime() >= record.expire_uptime
    else:
        over = record.expire_time is not None and time.time() >= record.expire_time
    if over:
        return "expired" if lifetime.lease_s is None else "lease lapsed"
    if lifetime.idle_s is None or not entry.runs or entry.machine is None:
        return ""
    return "idle" if entry.machine.idle_s() >= lifetime.idle_s else ""


async def keep(
    entries: Callable[[], Iterable[Entry]],
    end: Callable[[Entry, str], object],
    moved: Callable[[Entry], Awaitable[None]],
) -> None:
    """End sandboxes when it is time, until cancelled. Keeps no state, so that it can be started again.

    :param moved: called when a sandbox's time of day changed because the host's clock was set.
    :raises ExceptionGroup: unexpected errors of some sandboxes; all others were looked at.
    """
    while True:
        await asyncio.sleep(_SWEEP_S)
        failures = []
        jump_s = 0.0
        for entry in list(entries()):
            if entry.deleting is not None:
                continue
            try:
                jump_s = await _follow_clock(entry, moved) or jump_s
                if entry.deleting is None and (why := why_over(entry)):
                    end(entry, why)
            except Exception as error:  # noqa: BLE001  raised below
                failures.append(error)
        if jump_s:
            log.warning("the host's clock was set", seconds=round(jump_s, 3))
        if failures:
            raise ExceptionGroup("sandboxes cannot be ended", failures)


async def _follow_clock(entry: Entry, moved: Callable[[Entry], Awaitable[None]]) -> float:
    """Adapt the time of day at which a sandbox ends to a host's clock that was set; return by how many seconds."""
    record = entry.record
    if record.expire_uptime is None or record.expire_time is None:
        return 0.0
    expire_time = record.expire_uptime + time.time() - uptime()
    jump_s = expire_time - record.expire_time
    if abs(jump_s) <= _JUMP_S:
        return 0.0
    record.expire_time = expire_time
    try:
        await moved(entry)
    except AgentError as error:
        log.error("cannot keep when a sandbox ends", sandbox_id=record.id, error=error.message)
    return jump_s
