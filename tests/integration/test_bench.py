"""Every benchmark runs: one round of small sizes, whose JSON has each figure that the bench module declares."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.tools.bench.benches import NAMES, declared
from tests.tools.bench.figures import faults

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_gives_its_figures(name: str) -> None:
    words = [sys.executable, "-m", "tests.tools.bench", name, "--rounds", "1", "--small", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    answer = json.loads(line)
    assert (answer["bench"], answer["rounds"], answer["small"]) == (name, 1, True)
    assert answer["machine"]["cores"] >= 1
    assert faults(declared([name]), answer["figures"]) == []
