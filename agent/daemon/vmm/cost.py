"""What a VMM costs the host, as the kernel counts it for the process: proc(5)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU time in seconds, proportional set size in bytes; bytes of Ethernet frames that the guest received and sent;
    bytes read from and written to disks. 0 where it is unknown.
    """

    cpu_s: float = 0.0
    pss_bytes: int = 0
    net_received_bytes: int = 0
    net_sent_bytes: int = 0
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0


def cost_of(pid: int, tap: str) -> Cost:
    """Returns what the VMM has used so far; its guest is behind `tap`, in the network namespace of the VMM."""
    try:
        process = psutil.Process(pid)
        times, io = process.cpu_times(), process.io_counters()
        received, sent = _traffic(pid, tap)
        pss = process.memory_full_info().pss
    except (psutil.Error, OSError):
        return Cost()
    return Cost(times.user + times.system, pss, received, sent, io.read_bytes, io.write_bytes)


def _traffic(pid: int, tap: str) -> tuple[int, int]:
    """Returns what the guest behind a tap has received and sent: what the tap has sent and received."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == tap:
            fields = numbers.split()
            return int(fields[8]), int(fields[0])
    return 0, 0
