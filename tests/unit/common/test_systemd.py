"""What a service says to systemd and takes from it, and settings that are read again."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
from pathlib import Path

import pytest

from agent.common import systemd
from agent.common.background import QUICK, Supervisor
from agent.common.config.loading import load, merge_reloaded
from agent.common.config.settings import Settings
from agent.common.errors import ConfigError
from tests.support.daemon_fakes import SilentObserver


@pytest.fixture
def word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """The socket that systemd listens at."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "n"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
    return sock


async def test_the_watchdog_is_fed_as_often_as_it_wants(word: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000")
    feeding = asyncio.create_task(systemd.keep_watchdog())
    for _ in range(3):
        assert await asyncio.get_running_loop().run_in_executor(None, word.recv, 100) == b"WATCHDOG=1"
    feeding.cancel()
    word.close()


async def test_the_watchdog_is_fed_again_after_systemd_was_away(
    word: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000")
    word.setblocking(False)
    (tmp_path / "n").rename(tmp_path / "away")
    async with asyncio.timeout(10), Supervisor(SilentObserver()) as supervisor:
        supervisor.start("systemd-watchdog", systemd.keep_watchdog, QUICK)
        while not supervisor.failing:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        (tmp_path / "away").rename(tmp_path / "n")
        assert await asyncio.get_running_loop().sock_recv(word, 100) == b"WATCHDOG=1"
    word.close()


async def test_no_watchdog_is_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    await systemd.keep_watchdog()
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    monkeypatch.setenv("WATCHDOG_PID", "1")  # another process's
    await systemd.keep_watchdog()


def test_sockets_are_taken_by_name_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "api"))
    listener.listen()
    monkeypatch.setattr(systemd, "_FIRST_FD", os.dup(listener.fileno()))
    for name, value in (("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "api"), ("LISTEN_PID", str(os.getpid()))):
        monkeypatch.setenv(name, value)
    taken = systemd.listeners()
    assert list(taken) == ["api"]
    assert not taken["api"].get_inheritable()
    assert systemd.listeners() == {}
    taken["api"].close()
    listener.close()


def test_sockets_of_another_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert systemd.listeners() == {}


def test_what_can_change_changes_and_the_rest_is_told_of(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[node]\nmax_sandboxes = 3\nname = "b"\n[log]\nlevel = "debug"\n[egress]\ndeny = ["a.example"]\n')
    present = dataclasses.replace(Settings(), node=dataclasses.replace(Settings().node, name="a"))
    settings, changed, waiting = merge_reloaded(present, load(file, {}))
    assert (settings.node.max_sandboxes, settings.log.level) == (3, "debug")
    assert (settings.node.name, settings.egress.deny) == ("a", ())
    assert sorted(changed) == ["log.level", "node.max_sandboxes"]
    assert sorted(waiting) == ["egress.deny", "node.name"]
    assert merge_reloaded(settings, settings) == (settings, [], [])


def test_groups_by_name(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[api]\nunix_allow_gids = [7]\nunix_allow_groups = ["root"]\n')
    assert load(file, {}).api.group_ids() == {0, 7}
    file.write_text('[api]\nunix_allow_groups = ["nobody-at-all"]\n')
    with pytest.raises(ConfigError, match="group"):
        load(file, {})
