"""Files that are replaced in one step, with a disk that records what is synced and may fail at any call."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.common.atomic_file import publish_directory, replacement, sync, write_atomically
from agent.daemon.storage.volumes import VOLUME, Volumes


class Disk:
    """The calls that make a file durable, in their order; the one that is named in `fails` fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, Path]] = []
        self.fails: tuple[str, Path] | None = None
        real_fsync, real_rename = os.fsync, Path.rename

        def fsync(descriptor: int) -> None:
            self._note("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            real_fsync(descriptor)

        def rename(path: Path, target: Path) -> Path:
            self._note("rename", Path(target))
            return real_rename(path, target)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "rename", rename)

    def _note(self, call: str, path: Path) -> None:
        self.calls.append((call, path))
        if (call, path) == self.fails:
            raise OSError(errno.EIO, "broken disk")

    def index(self, call: str, wanted: Callable[[Path], bool]) -> int:
        return next(n for n, (name, path) in enumerate(self.calls) if name == call and wanted(path))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_content_and_mode(tmp_path: Path, mode: int, umask: int) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o666)
    before = os.umask(umask)
    try:
        write_atomically(path, b"new", mode=mode, durable=False)
    finally:
        os.umask(before)
    assert (path.read_bytes(), mode_of(path)) == (b"new", mode)
    assert list(tmp_path.iterdir()) == [path]


def test_temporary_file_is_private_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacement(path, mode=0o644, durable=False) as draft:
        draft.file.write(b"x")
        assert not path.exists()
        assert draft.path.parent == path.parent
        assert mode_of(draft.path) == 0o600
    assert mode_of(path) == 0o644


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_owner(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"", mode=0o640, durable=False, owner=(1234, 4321))
    facts = path.stat()
    assert (facts.st_uid, facts.st_gid, mode_of(path)) == (1234, 4321, 0o640)


def test_durable_syncs_the_file_before_the_rename_and_the_directory_after(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"new", mode=0o600, durable=True)
    (first, temporary), (second, target), (third, directory) = disk.calls
    assert (first, second, third) == ("fsync", "rename", "fsync")
    assert temporary.parent == tmp_path
    assert (target, directory) == (path, tmp_path)
    disk.calls.clear()
    write_atomically(path, b"new", mode=0o600, durable=False)
    assert disk.calls == [("rename", path)]


def test_failure_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    disk.fails = ("rename", path)
    with pytest.raises(OSError, match="broken disk"):
        write_atomically(path, b"new", mode=0o600, durable=True)
    with pytest.raises(ZeroDivisionError), replacement(path, mode=0o600, durable=True) as draft:
        draft.file.write(b"%d" % (1 // 0))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_link_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory of a sandbox is open to its VMM, which may put anything there."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(secrets, "token_hex", lambda length: "known")
    (tmp_path / ".file.known.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", b"new", mode=0o600, durable=False)
    with pytest.raises(OSError, match="symbolic links"):
        sync(tmp_path / ".file.known.tmp")
    assert victim.read_text() == "mine"


def test_publish_directory_syncs_all_of_it_first(tmp_path: Path, disk: Disk) -> None:
    draft, path = tmp_path / "draft", tmp_path / "whole"
    (draft / "inner").mkdir(parents=True)
    files = {draft / "one", draft / "inner" / "two"}
    for file in files:
        file.write_text("x")
    publish_directory(draft, path)
    renamed = disk.calls.index(("rename", path))
    assert {target for _, target in disk.calls[:renamed]} == {*files, draft / "inner", draft}
    assert disk.calls[renamed + 1 :] == [("fsync", tmp_path)]
    assert (path / "inner" / "two").read_text() == "x"


def test_publish_directory_that_fails_is_a_draft_again(tmp_path: Path, disk: Disk) -> None:
    draft, path = tmp_path / "draft", tmp_path / "whole"
    draft.mkdir()
    disk.fails = ("fsync", tmp_path)
    with pytest.raises(OSError, match="broken disk"):
        publish_directory(draft, path)
    assert draft.is_dir()
    assert not path.exists()


async def test_volume_has_its_name_once_facts_and_disk_are_durable(tmp_path: Path, disk: Disk) -> None:
    volumes = Volumes(tmp_path / "volumes")
    volumes.open()
    volume = await volumes.create("tenant", "data", 16 << 20)
    assert volume.id.startswith(VOLUME)
    published = disk.index("rename", lambda path: path.name == volume.id)
    for name in ("facts.json", "disk.img"):
        assert disk.index("fsync", lambda path, name=name: path.name == name) < published  # type: ignore[misc]
    assert disk.calls[published + 1] == ("fsync", tmp_path / "volumes")
    again = Volumes(tmp_path / "volumes")
    again.open()
    assert again.find("tenant", "data", VOLUME) == volume
    files: dict[str, Any] = {path.name: mode_of(path) for path in (tmp_path / "volumes" / volume.id).iterdir()}
    assert files == {"facts.json": 0o600, "disk.img": 0o600}
