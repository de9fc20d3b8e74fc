"""Detect processes killed by the kernel's OOM killer, from the kernel log (/dev/kmsg)."""

from __future__ import annotations

import os

_MAX_REMEMBERED = 4096


class OomWatcher:
    """Records the PIDs that the OOM killer has killed since the creation of this object."""

    def __init__(self, path: str = "/dev/kmsg") -> None:
        self._killed: dict[int, None] = {}
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            self._fd = -1

    def killed(self, pid: int) -> bool:
        """Return whether the OOM killer has killed `pid`; true once per kill, since PIDs are reused."""
        self._read_log()
        if pid in self._killed:
            del self._killed[pid]
            return True
        return False

    def _read_log(self) -> None:
        while self._fd >= 0:
            try:
                record = os.read(self._fd, 8192)
            except BlockingIOError:
                return
            except BrokenPipeError:  # unread records were overwritten: continue with the oldest record left
                continue
            except OSError:
                return
            if not record:
                return
            self._note(record)

    def _note(self, record: bytes) -> None:
        # "6,1234,5678,-;Out of memory: Killed process 321 (python3) ..." ; user space cannot forge facility 0 (kern).
        head, _, text = record.partition(b";")
        level = head.partition(b",")[0]
        if not level.isdigit() or int(level) >= 8 or b"Killed process " not in text:
            return
        number = text.partition(b"Killed process ")[2].split(b" ", 1)[0]
        if number.isdigit():
            self._killed[int(number)] = None
            while len(self._killed) > _MAX_REMEMBERED:
                del self._killed[next(iter(self._killed))]
