"""What arrived in the test internet: JSON lines, written there and read by tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Log:
    """Appends to a file; each line is one write, so that several processes may."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def note(self, kind: str, **facts: Any) -> None:
        """Adds a line."""
        os.write(self._fd, json.dumps({"kind": kind, **facts}).encode() + b"\n")


def read(path: Path, offset: int = 0) -> list[dict[str, Any]]:
    """Returns the lines from a byte offset on."""
    data = path.read_bytes()[offset:]
    return [json.loads(line) for line in data.splitlines()]
