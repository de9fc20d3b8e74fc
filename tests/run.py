"""Runs all tests: `tests/integration`, and at the same time the others, in a mount and PID namespace of their own.

Emulated guests keep one core busy at most, so two halves take little more than the longer one. They must not see one
another: each looks for what its tests leave behind, among namespaces, processes and directories in /tmp. Arguments are
pytest's; with any, there is one run of just these.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_HERE = ("tests/integration",)
_APART = ("tests/unit", "tests/sdk")
# $1 is a directory in the place of /tmp. The shell stays, as PID 1, so that somebody reaps orphans.
_ISOLATED = """
mount --bind "$1" /tmp && mkdir -p /run/netns && mount -t tmpfs none /run/netns || exit 99
shift
"$@"
exit $?
"""


def _pytest(*words: str) -> list[str]:
    return [sys.executable, "-m", "pytest", *words]


def _apart(scratch: Path) -> list[str]:
    return [
        "unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c", _ISOLATED, "bash",
        str(scratch), *_pytest(*_APART),
    ]  # fmt: skip


def main() -> int:
    """Returns the exit status: 0 if both halves passed."""
    if sys.argv[1:] or os.geteuid() != 0 or shutil.which("unshare") is None:
        return subprocess.run(_pytest(*sys.argv[1:]), check=False).returncode
    with tempfile.TemporaryDirectory(prefix="sandboxd-tests-", dir="/var/tmp") as name:
        scratch = Path(name)
        scratch.chmod(0o1777)
        said = scratch.with_suffix(".log")
        try:
            with said.open("wb") as log, subprocess.Popen(_apart(scratch), stdout=log, stderr=log) as other:
                here = subprocess.run(_pytest(*_HERE), check=False).returncode
                apart = other.wait()
            print(f"\n{' '.join(_APART)}, at the same time:", flush=True)
            sys.stdout.write(said.read_text(errors="replace"))
        finally:
            said.unlink(missing_ok=True)
    return here or apart


if __name__ == "__main__":
    sys.exit(main())
