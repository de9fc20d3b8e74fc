"""A real daemon per test session, and a client to it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from tests.client import Client

READY_TIMEOUT_S = 60


@dataclass
class Daemon:
    """A running `sandboxd` of our own."""

    directory: Path
    process: subprocess.Popen[bytes]
    env: dict[str, str]

    @property
    def socket(self) -> Path:
        return self.directory / "run" / "sandboxd.sock"

    @property
    def address(self) -> str:
        return f"unix:{self.socket}"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


def start_daemon(directory: Path, **settings: str) -> Daemon:
    """Starts a daemon with its own directories; settings as `section__key`. Returns once it is ready."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SANDBOXD_")}
    defaults = {
        "paths__run_dir": str(directory / "run"),
        "paths__state_dir": str(directory / "state"),
        "node__reserved_memory_bytes": "256MiB",
        "log__level": "debug",
    }
    env |= {f"SANDBOXD_{name.upper()}": value for name, value in {**defaults, **settings}.items()}
    images = os.environ.get("SANDBOXD_IMAGES__IMAGES_DIR")
    if images:
        env["SANDBOXD_IMAGES__IMAGES_DIR"] = images
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "agent"], env=env, stderr=log, stdout=log)
    daemon = Daemon(directory, process, env)
    deadline = float(READY_TIMEOUT_S)
    while not daemon.socket.exists():
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            deadline -= 0.05
            assert deadline > 0, daemon.log
        else:
            raise AssertionError(f"sandboxd ended: {daemon.log}")
    return daemon


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path: unix sockets lie below it."""
    path = Path(tempfile.mkdtemp(prefix="sbx-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def daemon() -> Iterator[Daemon]:
    path = Path(tempfile.mkdtemp(prefix="sbx-"))
    running = start_daemon(path)
    yield running
    assert running.stop() == 0, running.log
    shutil.rmtree(path)


@pytest.fixture
async def client(daemon: Daemon) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        yield Client(channel)
        # Cancelled calls end on the server a moment after they end here.
        await asyncio.sleep(0)
