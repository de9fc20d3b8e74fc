"""Fixtures of all tests: nothing may leak, and tests of VMs run where VMs can."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import leaks
from tests.support.internet.internet import Internet, running
from tests.tools.reliability import Reliability

IMAGES_DIR = Path(os.environ.get("SANDBOXD_IMAGES__IMAGES_DIR", "/var/lib/sandboxd/images"))


def _why_no_vm() -> str | None:
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("qemu-system-x86_64") is None:
        return "needs qemu-system-x86_64: ./bootstrap.sh"
    if not (IMAGES_DIR / "minimal" / "manifest.json").exists():
        return f"needs the image minimal in {IMAGES_DIR}: just image"
    return None


def pytest_configure() -> None:
    """Marks all that this run will start, for the leak check."""
    os.environ[leaks.MARK] = str(os.getpid())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks fault tests; skips tests of VMs where no VM can run, and says why."""
    for item in items:
        if "reliability" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.fault)
    reason = _why_no_vm()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("vm") is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path: unix sockets lie below it."""
    path = leaks.make_directory()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def reliability(request: pytest.FixtureRequest) -> Reliability:
    """Takes down what a fault test saw."""
    return Reliability(request.node.nodeid.partition("::")[2].partition("[")[0])


@pytest.fixture(scope="session")
def internet() -> Iterator[Internet]:
    with running() as made:
        yield made


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """Fails a test that leaves something of ours, and removes it."""
    # Fixtures of wider scope are set up first: what they hold is theirs.
    before = leaks.snapshot()
    yield
    left = leaks.wait_for_leaks(before)
    if found := left.describe():
        leaks.clean(left)
        pytest.fail("left behind: " + "; ".join(found), pytrace=False)
