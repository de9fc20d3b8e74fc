"""The JavaScript suite: each file is run by node's own test runner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agent.gateway.methods.table import METHODS
from tests.sdk.node_sdk import JS
from tests.support.gateway import Gateway

NODE = Path(sys.executable).parent / "node"
SUITES = sorted(path.name for path in JS.glob("*.test.mjs"))
_ran: set[str] = set()
_called: set[str] = set()


@pytest.mark.parametrize("suite", SUITES)
def test_suite(suite: str, gateway: Gateway, node_modules: Path) -> None:
    before = gateway.called()
    result = subprocess.run(
        [NODE, "--test", "--test-reporter=spec", "--test-timeout=60000", "--test-force-exit", suite],
        cwd=node_modules, env=gateway.client_env(), capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"{result.stdout[-12000:]}\n{result.stderr[-4000:]}\n{gateway.log[-2000:]}"
    _ran.add(suite)
    _called.update(gateway.called() - before)


def test_every_method_was_called() -> None:
    """By the gateway's own count: each of the 54 methods gave this SDK a result."""
    if _ran != set(SUITES):
        pytest.skip("not all suites ran")
    assert set(METHODS) - _called == set()
