"""A `sandboxd` process of a test's own, and what tests of it ask again and again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support import uplink
from tests.support.client import Client, reason

READY_TIMEOUT_S = 60
AGENT = (sys.executable, "-m", "agent.daemon")


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

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    def left(self) -> list[str]:
        """Returns the directories of sandboxes that this daemon has on the host."""
        places = (self.run_dir / "vm", self.directory / "state" / "sandboxes")
        return sorted(str(entry) for place in places if place.exists() for entry in place.iterdir())

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)

    def kill(self) -> None:
        """Ends the daemon as the kernel would: without a chance to clean up."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)

    def answers(self) -> bool:
        """Whether somebody listens at the socket, which a killed daemon leaves behind."""
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(str(self.socket)) == 0


def start_daemon(directory: Path, *, argv: Sequence[str] = AGENT, **settings: str) -> Daemon:
    """Starts a daemon with its own directories; settings as `section__key`. Returns once it is ready."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SANDBOXD_")}
    defaults = {
        "paths__run_dir": str(directory / "run"),
        "paths__state_dir": str(directory / "state"),
        "node__reserved_memory_bytes": "256MiB",
        "log__level": "debug",
        "egress__uplink": uplink.name(),
    }
    env |= {f"SANDBOXD_{name.upper()}": value for name, value in {**defaults, **settings}.items()}
    images = os.environ.get("SANDBOXD_IMAGES__IMAGES_DIR")
    if images:
        env.setdefault("SANDBOXD_IMAGES__IMAGES_DIR", images)
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen(argv, env=env, stderr=log, stdout=log)
    daemon = Daemon(directory, process, env)
    deadline = float(READY_TIMEOUT_S)
    while not daemon.answers():
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            deadline -= 0.05
            if deadline <= 0:
                daemon.kill()
                raise AssertionError(f"sandboxd is not ready: {daemon.log}") from None
        else:
            raise AssertionError(f"sandboxd ended: {daemon.log}")
    return daemon


@contextmanager
def daemon_with(directory: Path, *, keeps: bool = False, **settings: Any) -> Iterator[Daemon]:
    """A daemon of the test's own that must stop well and leave nothing, unless it `keeps` its sandboxes."""
    running = start_daemon(directory, **settings)
    try:
        yield running
        if running.process.poll() is None:
            assert running.stop() == 0, running.log
            assert keeps or running.left() == [], running.log
    finally:
        if running.process.poll() is None:
            running.kill()


@asynccontextmanager
async def connected(daemon: Daemon) -> AsyncIterator[Client]:
    """A client of any daemon."""
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        yield Client(channel)


@contextmanager
def refused(code: grpc.StatusCode, why: str) -> Iterator[pytest.ExceptionInfo[grpc.aio.AioRpcError]]:
    """Expects the call inside to fail with this code and reason."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield caught
    assert (caught.value.code(), reason(caught.value)) == (code, why), caught.value.details()


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 10.0) -> None:
    """Returns once `condition` holds; fails if it does not in time."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110  what is awaited is outside of this process
            await asyncio.sleep(0.02)
