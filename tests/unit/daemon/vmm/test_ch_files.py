"""Where a Cloud Hypervisor VM's files lie, and what is believed of those that the VMM writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.common.errors import VmmError
from agent.daemon.host.process import Confinement
from agent.daemon.vmm.cloud_hypervisor import layout as layouts
from agent.daemon.vmm.cloud_hypervisor.layout import Layout

NOBODY = Confinement()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "run")
    made.run_dir.mkdir(mode=0o700)
    made.create(NOBODY)
    return made


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.mkdir()
    return path


def fill(layout: Layout) -> None:
    for name in ("config.json", "state.json"):
        (layout.snapshot / name).write_text(name)


def test_a_snapshot_is_copied(layout: Layout, target: Path) -> None:
    fill(layout)
    layout.copy_snapshot(target)
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "config.json": "config.json",
        "state.json": "state.json",
    }


def test_a_snapshot_with_ram_in_it_is_none(layout: Layout, target: Path) -> None:
    fill(layout)
    (layout.snapshot / "memory-ranges").touch()
    with pytest.raises(VmmError, match="memory-ranges") as caught:
        layout.copy_snapshot(target)
    assert caught.value.reason == "SNAPSHOT_FAILED"
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("kind", ["missing", "link", "pipe", "directory", "large"])
def test_what_the_vmm_wrote_is_checked(
    layout: Layout, target: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(layout)
    path = layout.snapshot / "state.json"
    path.unlink()
    if kind == "link":
        path.symlink_to("/etc/hostname")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "large":
        monkeypatch.setattr(layouts, "_MAX_STATE_BYTES", 100)
        path.write_bytes(b"x" * 101)
    with pytest.raises(VmmError) as caught:
        layout.copy_snapshot(target)
    assert caught.value.reason == "SNAPSHOT_FAILED"
    assert not (target / "state.json").exists()


def test_what_a_clone_is_restored_from(layout: Layout, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    state.write_text("state")
    for _ in range(2):
        layout.create_restore(b"config", tmp_path, NOBODY)
        assert sorted(path.read_text() for path in layout.restore.iterdir()) == ["config", "state"]
    (tmp_path / "memory-ranges").write_text("RAM")
    layout.create_restore(b"config", tmp_path, NOBODY)
    assert sorted(path.read_text() for path in layout.restore.iterdir()) == ["RAM", "config", "state"]
    layout.remove_restore()
    layout.remove_restore()
    assert not layout.restore.exists()
    with pytest.raises(VmmError, match="cannot be read"):
        layout.create_restore(b"config", tmp_path / "none", NOBODY)


def test_removed_is_all_but_logs(layout: Layout) -> None:
    for path in (layout.api, layout.events, layout.log_pipe, layout.console_pipe, layout.log, layout.console):
        path.touch()
    (layout.vmm_dir / "vsock.sock").touch()
    outside = layout.run_dir / "kept"
    outside.write_text("kept")
    (layout.vmm_dir / "link").symlink_to(outside)
    layout.remove()
    layout.remove()
    assert sorted(path.name for path in layout.run_dir.iterdir()) == ["console.log", "kept", "vmm.log"]
    assert outside.read_text() == "kept"


def test_directories_are_private(layout: Layout) -> None:
    (layout.vmm_dir / "stale").touch()
    layout.create(NOBODY)
    assert list(layout.vmm_dir.iterdir()) == []
    for path in (layout.run_dir, layout.vmm_dir, layout.snapshot):
        assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_another_user_owns_its_own_directories_and_enters_the_other(layout: Layout) -> None:
    layout.create(Confinement(64123, 64124))
    facts = layout.run_dir.stat()
    assert (facts.st_uid, facts.st_gid, facts.st_mode & 0o777) == (0, 64124, 0o710)
    for path in (layout.vmm_dir, layout.snapshot):
        facts = path.stat()
        assert (facts.st_uid, facts.st_gid, facts.st_mode & 0o777) == (64123, 64124, 0o700)
