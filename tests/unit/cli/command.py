"""Runs `sandboxctl` as a process, without a daemon."""

from __future__ import annotations

import os
import subprocess
import sys


def ctl(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `sandboxctl` with no settings but these."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("SANDBOXD_")}
    argv = [sys.executable, "-m", "agent.cli.app", *words]
    return subprocess.run(argv, env=own | env, capture_output=True, text=True, timeout=60, check=False)
