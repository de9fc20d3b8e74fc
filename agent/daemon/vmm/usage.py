"""Resource usage of a VMM process, as the kernel counts it: proc(5)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class VmmUsage:
    """Usage since the VMM started; 0 where it is unknown.

    :param cpu_s: CPU time in seconds.
    :param pss_bytes: proportional set size.
    :param net_received_bytes: bytes of Ethernet frames that the guest received.
    :param net_sent_bytes: bytes of Ethernet frames that the guest sent.
    """

    cpu_s: float = 0.0
    pss_bytes: int = 0
    net_received_bytes: int = 0
    net_sent_bytes: int = 0
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0


def read_usage(pid: int, tap: str) -> VmmUsage:
    """Return the usage of the VMM `pid`, whose guest is behind `tap` in the VMM's network namespace. Blocks."""
    try:
        process = psutil.Process(pid)
        times, io = process.cpu_times(), process.io_counters()
        received, sent = _guest_traffic(pid, tap)
        pss = process.memory_full_info().pss
    except (psutil.Error, OSError):
        return VmmUsage()
    return VmmUsage(times.user + times.system, pss, received, sent, io.read_bytes, io.write_bytes)


def _guest_traffic(pid: int, tap: str) -> tuple[int, int]:
    """Return (received, sent) bytes of the guest: the opposite directions of its tap on the host."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == tap:
            fields = numbers.split()
            return int(fields[8]), int(fields[0])
    return 0, 0
