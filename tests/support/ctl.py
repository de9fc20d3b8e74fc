"""`sandboxctl` as tests run it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 60.0


@dataclass
class Ctl:
    """Runs `sandboxctl` with the settings of the session's daemon."""

    env: dict[str, str]

    @staticmethod
    def argv(*words: str) -> list[str]:
        return [sys.executable, "-m", "agent.cli.app", *words]

    def __call__(self, *words: str, status: int = 0, stdin: bytes = b"") -> bytes:
        done = subprocess.run(
            self.argv(*words), env=self.env, input=stdin, capture_output=True, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == status, (words, done.returncode, done.stdout[-500:], done.stderr[-2000:])
        self.err = done.stderr.decode()
        return done.stdout

    def objects(self, *words: str) -> list[dict[str, Any]]:
        """What --json prints: nothing but an object a line."""
        return [json.loads(line) for line in self("--json", *words).splitlines()]

    def start(self, *words: str, **streams: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.argv(*words), env=self.env, **streams)
