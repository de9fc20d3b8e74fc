"""The JavaScript SDK as its registry has it, as locked: installed on first use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

JS = Path(__file__).parent / "js"
SDK = JS / "node_modules/@deno/sandbox/esm/mod.js"


def install() -> None:
    """Ensures that the SDK is there."""
    installed, lock = JS / "node_modules" / ".package-lock.json", JS / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        npm = Path(sys.executable).parent / "npm"  # that of the environment: the machine may have none, or an old one
        subprocess.run([npm, "ci", "--no-audit", "--no-fund"], cwd=JS, check=True, capture_output=True)
