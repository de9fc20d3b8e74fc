"""Talk to systemd: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3). No-ops if not started by systemd."""

from __future__ import annotations

import asyncio
import os
import socket
import time

_FIRST_FD = 3


def notify(message: str) -> None:
    """Send a message such as "READY=1" or "STOPPING=1" to systemd."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(message.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)


def notify_reloading() -> None:
    """Tell systemd that the settings are being reloaded; "READY=1" must follow."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


async def keep_watchdog() -> None:
    """Send watchdog pings from the event loop; return at once if systemd has set no watchdog for this process."""
    period_us = int(os.environ.get("WATCHDOG_USEC", "0"))
    if not period_us or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(period_us / 3e6)


def listeners() -> dict[str, socket.socket]:
    """Take over the listening sockets from systemd; return them by FileDescriptorName. A second call returns {}."""
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return {}
    taken = {}
    for number in range(count):
        sock = socket.socket(fileno=_FIRST_FD + number)
        sock.set_inheritable(False)
        sock.setblocking(False)
        taken[names[number] if number < len(names) else str(number)] = sock
    return taken
