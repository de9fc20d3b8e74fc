"""Serve sys.stats and sys.processes: load, memory, disk and processes of the guest, from proc(5)."""

from __future__ import annotations

import os

from guest import reactor
from guest.call import Call
from guest.wire import Frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.call import Handler

_PAGE = 64
_MAX_COMMAND = 1024
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def _memory() -> dict[str, int]:
    with open("/proc/meminfo") as file:
        lines = (line.split() for line in file)
        return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) >= 2}


async def _stats(_call: Call) -> dict[str, object]:
    memory = _memory()
    disk = os.statvfs("/")
    with open("/proc/uptime") as file:
        uptime = float(file.read().split()[0])
    return {
        "memory_total": memory["MemTotal"], "memory_available": memory["MemAvailable"], "load": list(os.getloadavg()),
        "disk_total": disk.f_blocks * disk.f_frsize, "disk_available": disk.f_bavail * disk.f_frsize,
        "processes": sum(name.isdigit() for name in os.listdir("/proc")), "uptime_s": uptime,
    }  # fmt: skip


def _process(pid: int) -> dict[str, object]:
    with open(f"/proc/{pid}/stat", "rb") as file:
        head, _, rest = file.read().rpartition(b")")
    words = rest.split()
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        command = os.fsdecode(file.read(_MAX_COMMAND).replace(b"\0", b" ").strip())
    return {
        "pid": pid, "ppid": int(words[1]), "uid": os.stat(f"/proc/{pid}").st_uid, "state": words[0].decode(),
        "rss": int(words[21]) * _PAGE_BYTES, "command": command or f"[{os.fsdecode(head.partition(b'(')[2])}]",
        "cpu_s": (int(words[11]) + int(words[12])) / _TICKS,
    }  # fmt: skip


async def _processes(call: Call) -> dict[str, object]:
    pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    for start in range(0, len(pids), _PAGE):
        page = []
        for pid in pids[start : start + _PAGE]:
            try:
                page.append(_process(pid))
            except (FileNotFoundError, ProcessLookupError):
                continue
        await call.send_json(Frame.EVENT, {"processes": page})
        await reactor.checkpoint()
    return {}


OPS: dict[str, Handler] = {"sys.stats": _stats, "sys.processes": _processes}
