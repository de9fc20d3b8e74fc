"""Fixtures of tests of changes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.daemon_fakes import Bench, bench
from tests.support.stored_changes import Disk


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    async with bench(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def disk(node: Bench, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(node.store, monkeypatch)
