"""The daemon as a whole, with a fake VMM: start, signals, what it leaves."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from agent.common import systemd, telemetry
from agent.common.config.settings import Settings
from agent.common.errors import InvalidState
from agent.common.systemd import notify
from agent.daemon import app
from agent.daemon.app import agent
from agent.daemon.rpc.server import ApiServer
from agent.daemon.sandbox.lifecycle.expiry import Expiry
from agent.daemon.sandbox.service import SandboxService
from sandboxd.v1 import node_pb2
from tests.support import leaks
from tests.support.client import Client
from tests.support.daemon_fakes import FakeDriver, World, settings


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short: unix sockets lie below it."""
    path = leaks.make_directory()
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def fake_vmm(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fake(settings: Settings, boot_files: object) -> FakeDriver:
        return FakeDriver(World())

    monkeypatch.setattr(app, "choose_driver", fake)


async def test_it_serves_while_the_context_lasts(directory: Path) -> None:
    async with agent(settings(directory)) as server:
        async with grpc.aio.insecure_channel(f"unix:{server.socket_path}") as channel:
            assert (await Client(channel).nodes.GetNode(node_pb2.GetNodeRequest())).name == "node"
        mode = (directory / "run" / "private").stat().st_mode
        assert mode & 0o777 == 0o700
    assert sorted(path.name for path in (directory / "run").rglob("*")) == ["agent.lock", "private"]


@pytest.mark.parametrize("shared", ["run", "state"])
async def test_a_second_agent_refuses_and_harms_nothing(directory: Path, shared: str) -> None:
    first = settings(directory)
    second = settings(directory / "second")
    paths = {"run": {"run_dir": first.paths.run_dir}, "state": {"state_dir": first.paths.state_dir}}[shared]
    clash = Settings(node=second.node, paths=type(second.paths)(**{**_paths(second), **paths}))
    async with agent(first) as server:
        with pytest.raises(InvalidState, match="another sandboxd owns"):
            async with agent(clash):
                pass
        assert server.socket_path.exists()
    async with agent(clash):  # what the refused one had locked is free again
        pass


def _paths(chosen: Settings) -> dict[str, Path]:
    return {"run_dir": chosen.paths.run_dir, "state_dir": chosen.paths.state_dir}


async def test_signals_end_it_in_order(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(directory / "notify"))
        listener.setblocking(False)
        os.environ["NOTIFY_SOCKET"] = str(directory / "notify")
        try:
            running = asyncio.create_task(app.run(settings(directory)))
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(10):
                assert await loop.sock_recv(listener, 100) == b"READY=1"
                os.kill(os.getpid(), signal.SIGHUP)
                await asyncio.sleep(0.01)
                assert not running.done()
                os.kill(os.getpid(), signal.SIGTERM)
                assert await loop.sock_recv(listener, 100) == b"STOPPING=1"
                await running
        finally:
            del os.environ["NOTIFY_SOCKET"]
            signal.signal(signal.SIGHUP, signal.SIG_DFL)


async def test_settings_are_read_again_after_a_reload_that_failed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(systemd, "notify", said.append)
    present = settings(directory)
    wanted = dataclasses.replace(present, node=dataclasses.replace(present.node, max_sandboxes=3))
    answers: list[Settings | Exception] = [OSError(24, "Too many open files"), wanted]

    def read() -> Settings:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    running = asyncio.create_task(app.run(present, read))
    made: list[ApiServer] = []
    start = ApiServer.start

    async def remember(self: ApiServer) -> None:
        made.append(self)
        await start(self)

    monkeypatch.setattr(ApiServer, "start", remember)
    try:
        async with asyncio.timeout(30):
            while "READY=1" not in said:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGHUP)
            while "reload" not in made[0].supervisor.failing:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert [word.partition("\n")[0] for word in said] == ["READY=1", "RELOADING=1", "READY=1"]
            os.kill(os.getpid(), signal.SIGHUP)
            while made[0].sandboxes.describe_node().sandboxes.total != 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            await running
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert answers == []


@pytest.mark.parametrize(
    ("owner", "loop"), [(SandboxService, "prewarm_templates"), (SandboxService, "count_drops"), (Expiry, "run")]
)
async def test_a_loop_that_fails_is_restarted_and_named(
    directory: Path, monkeypatch: pytest.MonkeyPatch, owner: type, loop: str
) -> None:
    async def fail(_self: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(owner, loop, fail)
    async with agent(settings(directory)) as server:
        async with asyncio.timeout(10):
            while not server.supervisor.failing:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        (sentence,) = server.supervisor.sentences()
        assert sentence in server.sandboxes.describe_node().degraded
        (name,) = server.supervisor.failing
        assert telemetry.registry.get_sample_value("sandboxd_background_failing", {"loop": name}) == 1
        failures = telemetry.registry.get_sample_value("sandboxd_background_failures_total", {"loop": name})
        assert failures is not None
        assert failures >= 1
    assert telemetry.registry.get_sample_value("sandboxd_background_failing", {"loop": name}) == 0


def test_nobody_to_notify_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")


def test_a_start_that_fails_says_why_and_exits_1(directory: Path) -> None:
    env = {
        **os.environ, "SANDBOXD_PATHS__RUN_DIR": str(directory / "run"), "SANDBOXD_VMM__BINARY": "/nonexistent",
        "SANDBOXD_PATHS__STATE_DIR": str(directory / "state"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "agent.daemon"], env=env, capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode == 1
    assert "/nonexistent cannot be run" in done.stderr
    assert "Traceback" not in done.stderr
