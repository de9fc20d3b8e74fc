"""The image store and the disk maker of the agent (no root needed: mke2fs writes to plain files)."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.common.errors import AlreadyExists, HostError, InvalidSpec, InvalidState, NotFound, ResourceExhausted
from agent.daemon.host import sparse_copy
from agent.daemon.host.sparse_copy import copy_sparse
from agent.daemon.storage import disks
from agent.daemon.storage import images as image_store
from agent.daemon.storage.disks import DiskMaker
from agent.daemon.storage.images import ImageStore

MIB = 1 << 20


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_manifest(files: dict[str, bytes]) -> dict[str, Any]:
    digests = {part: sha256(data) for part, data in files.items()}
    parts = {part: {"file": part, "sha256": digests[part], "size_bytes": len(data)} for part, data in files.items()}
    return {
        "schema": 1,
        "name": "minimal",
        "digest": sha256(json.dumps(digests, sort_keys=True, separators=(",", ":")).encode()),
        "input_digest": "ab" * 32,
        "created": "2026-11-20T17:06:56Z",
        "kernel": {**parts["kernel"], "version": "6.12"},
        "initramfs": parts["initramfs"],
        "root": {**parts["root"], "format": "erofs"},
        "min_memory_bytes": 128 * MIB,
        "packages": [{"name": "bash", "version": "5.2"}],
        "inputs": {"suite": "trixie"},
    }


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An images directory with one image, `minimal`."""
    folder = tmp_path / ".store" / "minimal-0123456789ab"
    folder.mkdir(parents=True)
    files = {"kernel": b"K" * 10, "initramfs": b"I" * 5, "root": b"R" * 20}
    for part, data in files.items():
        (folder / part).write_bytes(data)
    (folder / "manifest.json").write_text(json.dumps(make_manifest(files)))
    (tmp_path / "minimal").symlink_to(folder.relative_to(tmp_path))
    return tmp_path


def test_an_image_is_its_manifest_and_files(images: Path) -> None:
    store = ImageStore(images)
    image = store.get("minimal")
    assert image.path == images / ".store/minimal-0123456789ab"
    assert image.kernel.path.read_bytes() == b"K" * 10
    assert (image.kernel_version, image.root_format, image.size_bytes) == ("6.12", "erofs", 35)
    assert image.packages == (image_store.Package("bash", "5.2"),)
    assert store.list() == [image]
    store.verify(image)


def test_an_unknown_image_says_how_to_build_it(images: Path) -> None:
    with pytest.raises(NotFound, match=r"there are: minimal.*sandboxctl image build other") as raised:
        ImageStore(images).get("other")
    assert raised.value.reason == "IMAGE_NOT_FOUND"
    assert ImageStore(images / "nowhere").list() == []


@pytest.mark.parametrize("name", ["", ".", "..", ".store", "../etc", "a/b", "A", "a" * 64, "a\0b", "x\n"])
def test_names_that_are_paths_are_refused(images: Path, name: str) -> None:
    with pytest.raises(InvalidSpec):
        ImageStore(images).get(name)


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(schema=2),
        lambda m: m.pop("kernel"),
        lambda m: m.update(name="other"),
        lambda m: m.update(digest="cd" * 32),
        lambda m: m.update(digest=7),
        lambda m: m.update(min_memory_bytes=-1),
        lambda m: m.update(min_memory_bytes=True),
        lambda m: m.update(packages={"bash": "5"}),
        lambda m: m.update(inputs=3),
        lambda m: m["root"].update(format="ntfs"),
        lambda m: m["root"].update(file="../../../etc/passwd"),
        lambda m: m["root"].update(file="absent"),
        lambda m: m["root"].update(size_bytes=21),
        lambda m: m["kernel"].update(sha256="xyz"),
    ],
)
def test_a_manifest_is_believed_only_when_all_of_it_is_right(
    images: Path, edit: Callable[[dict[str, Any]], object]
) -> None:
    store = ImageStore(images)
    change(images / "minimal/manifest.json", edit)
    with pytest.raises(HostError, match=r"damaged.*sandboxctl image build minimal") as raised:
        store.get("minimal")
    assert raised.value.reason == "IMAGE_DAMAGED"
    assert store.list() == []


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema": 1}'])
def test_garbage_is_no_manifest(images: Path, data: bytes) -> None:
    (images / "minimal/manifest.json").write_bytes(data)
    with pytest.raises(HostError, match="damaged"):
        ImageStore(images).get("minimal")


def test_a_missing_manifest_is_damage(images: Path) -> None:
    (images / "minimal/manifest.json").unlink()
    with pytest.raises(HostError, match="no manifest"):
        ImageStore(images).get("minimal")


def test_verify_names_the_changed_file(images: Path) -> None:
    store = ImageStore(images)
    image = store.get("minimal")
    image.root.path.write_bytes(b"X" * 20)
    with pytest.raises(HostError, match="root does not have the digest"):
        store.verify(image)


def test_a_new_build_is_seen_and_the_old_image_stays_usable(images: Path) -> None:
    store = ImageStore(images)
    before = store.get("minimal")
    folder = images / ".store/minimal-ffffffffffff"
    folder.mkdir()
    files = {"kernel": b"k", "initramfs": b"i", "root": b"r"}
    for part, data in files.items():
        (folder / part).write_bytes(data)
    (folder / "manifest.json").write_text(json.dumps(make_manifest(files)))
    (images / "link").symlink_to(folder.relative_to(images))
    (images / "link").replace(images / "minimal")
    after = store.get("minimal")
    assert after.digest != before.digest
    assert before.kernel.path.exists()


def test_removing_leaves_nothing_of_that_name(images: Path) -> None:
    (images / ".store/minimal-ffffffffffff").mkdir()
    (images / ".store/minimal-extra-ffffffffffff").mkdir()
    store = ImageStore(images)
    store.remove("minimal")
    assert sorted(os.listdir(images / ".store")) == [".lock", "minimal-extra-ffffffffffff"]
    with pytest.raises(NotFound):
        store.remove("minimal")


def test_nothing_is_removed_under_a_build(images: Path) -> None:
    with (images / ".store/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InvalidState):
            ImageStore(images).remove("minimal")
    assert ImageStore(images).get("minimal").name == "minimal"


# Disks


def extents(path: Path) -> list[tuple[int, int]]:
    found, end, size = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # ENXIO: no more data
                break
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append((start, end))
    return found


@pytest.mark.parametrize("clones", [True, False])
def test_copies_have_the_same_bytes_and_holes(tmp_path: Path, clones: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not clones:
        monkeypatch.setattr(sparse_copy, "_clone", lambda source, target: False)
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.truncate(64 * MIB)
        for at in (0, 3 * MIB, 40 * MIB):
            file.seek(at)
            file.write(os.urandom(5000))
    copy_sparse(source, target)
    assert target.stat().st_size == 64 * MIB
    assert extents(target) == extents(source)
    assert target.stat().st_blocks * 512 < MIB
    for start, end in extents(source):
        with source.open("rb") as a, target.open("rb") as b:
            assert os.pread(a.fileno(), end - start, start) == os.pread(b.fileno(), end - start, start)


def test_a_disk_is_an_empty_sparse_ext4(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    asyncio.run(DiskMaker(tmp_path / "templates").make_disk(disk, 1024 * MIB))
    assert disk.stat().st_size == 1024 * MIB
    assert disk.stat().st_blocks * 512 < MIB
    assert disk.stat().st_mode & 0o777 == 0o600
    env = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
    subprocess.run(["e2fsck", "-fn", str(disk)], check=True, capture_output=True, env=env)
    facts = subprocess.run(["dumpe2fs", str(disk)], check=True, capture_output=True, env=env, text=True).stdout
    assert "sandboxd" in facts
    assert "has_journal" not in facts
    groups = facts.count("(Blocks ")
    assert groups == 8
    assert facts.count("ITABLE_ZEROED") == groups  # so the guest's kernel writes no inode tables later


async def test_formatting_happens_once_per_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = DiskMaker(tmp_path / "templates")
    formatted: list[Path] = []
    real = disks.run_mkfs

    def counting(path: Path) -> None:
        formatted.append(path)
        real(path)

    monkeypatch.setattr(disks, "run_mkfs", counting)
    await asyncio.gather(*(maker.make_disk(tmp_path / f"{n}.raw", 32 * MIB) for n in range(8)))
    await maker.make_disk(tmp_path / "other.raw", 64 * MIB)
    assert len(formatted) == 2
    assert len(os.listdir(tmp_path / "templates")) == 2


@pytest.mark.parametrize("size", [-1, 0, 1, 16 * MIB - 4096, 16 * MIB + 1, 1 << 62])
async def test_impossible_sizes_are_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(InvalidSpec) as raised:
        await DiskMaker(tmp_path / "templates").make_disk(tmp_path / "disk.raw", size)
    assert raised.value.reason == "INVALID_DISK_SIZE"
    assert os.listdir(tmp_path) == []


async def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_text("precious")
    with pytest.raises(AlreadyExists):
        await DiskMaker(tmp_path / "templates").make_disk(disk, 16 * MIB)
    assert disk.read_text() == "precious"


def failing(number: int) -> Callable[..., int]:
    def fail(*_args: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, ResourceExhausted), (errno.EDQUOT, ResourceExhausted), (errno.EIO, HostError)]
)
async def test_a_failed_copy_leaves_no_file(
    tmp_path: Path, number: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = DiskMaker(tmp_path / "templates")
    await maker.make_disk(tmp_path / "first.raw", 16 * MIB)
    monkeypatch.setattr(sparse_copy, "_clone", lambda source, target: False)
    monkeypatch.setattr(os, "pwrite", failing(number))
    with pytest.raises(error):
        await maker.make_disk(tmp_path / "disk.raw", 16 * MIB)
    assert not (tmp_path / "disk.raw").exists()


async def test_a_failed_format_leaves_no_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "run_mkfs", failing(errno.ENOSPC))
    with pytest.raises(ResourceExhausted):
        await DiskMaker(tmp_path / "templates").make_disk(tmp_path / "disk.raw", 16 * MIB)
    assert os.listdir(tmp_path / "templates") == []


async def test_a_cancelled_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = DiskMaker(tmp_path / "templates")
    started, go = threading.Event(), threading.Event()
    real = copy_sparse

    def slow(source: Path, target: Path) -> None:
        started.set()
        go.wait(5)
        real(source, target)

    monkeypatch.setattr(disks, "copy_sparse", slow)
    task = asyncio.create_task(maker.make_disk(tmp_path / "disk.raw", 16 * MIB))
    await asyncio.to_thread(started.wait, 5)
    task.cancel()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (tmp_path / "disk.raw").exists()


async def test_mkfs_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kw: None)
    with pytest.raises(HostError, match="e2fsprogs"):
        await DiskMaker(tmp_path / "templates").make_disk(tmp_path / "disk.raw", 16 * MIB)
