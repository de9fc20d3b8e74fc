"""The Python suite: run by pytest in a process of its own, with nothing of this run but the client's environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from agent.gateway.methods.table import METHODS
from tests.support.gateway import Gateway

SUITE = Path(__file__).parent / "python" / "suite.py"


# What this SDK has no calls for.
_JAVASCRIPT_ALONE = {"abort", "vscode"}


def test_suite(gateway: Gateway) -> None:
    before = gateway.called()
    result = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", SUITE.parent,
            "--confcutdir", SUITE.parent, "-o", "asyncio_mode=auto", "-p", "no:cacheprovider",
            "-W", "ignore", "--timeout=100", SUITE,
        ],
        cwd=SUITE.parent, env=gateway.client_env(), capture_output=True, text=True, timeout=230, check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"{result.stdout[-12000:]}\n{result.stderr[-2000:]}\n{gateway.log[-2000:]}"
    assert set(METHODS) - set(gateway.called() - before) == _JAVASCRIPT_ALONE
