"""The child processes of this process, to compare before and after: fixtures of other tests have some, too."""

from __future__ import annotations

import os
from pathlib import Path


def children() -> set[str]:
    """Return the PIDs of the children of the main thread, zombies included (proc_tid_children(5))."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
