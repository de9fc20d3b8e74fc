"""Clock for durations that must last across a sleep of the host and a change of its time of day."""

from __future__ import annotations

import time


def uptime_s() -> float:
    """Return the seconds since the host's boot, sleep included (CLOCK_BOOTTIME, clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
