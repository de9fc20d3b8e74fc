"""Root file systems on the host's side: the store of images that VMs boot, and the disks that they write on.

Images are made by the builder (`rootfs/`), whose manifest is the only thing the two share:

    <images_dir>/<name> -> .store/<name>-<12 hex digits>/{manifest.json,vmlinux,initramfs,root.erofs}
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agent.errors import (
    AgentError,
    AlreadyExists,
    HostError,
    ImageDamaged,
    InvalidSpec,
    InvalidState,
    NotFound,
    ResourceExhausted,
)
from agent.sparse import NO_SPACE, copy_sparse

_SCHEMA = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ENTRY_SUFFIX = "-" + "[0-9a-f]" * 12

MIN_DISK_BYTES = 16 << 20
MAX_DISK_BYTES = 16 << 40
_BLOCK_BYTES = 4096
_TEMPLATES_KEPT = 32

# A sandbox's disk is thrown away with it, so nothing is spent on surviving a crash: no journal, no checksums, no backup
# superblocks but two. Unwritten inode tables stay holes, so the default number of inodes costs nothing.
# What is on a new disk: the folders of the guest's overlay, and the files that every guest writes first. Making them
# there would cost an emulated guest a tenth of its start.
_FOLDERS = ("upper/etc", "work")
_FILES = tuple(f"upper/etc/{name}" for name in ("hostname", "hosts", "machine-id", "resolv.conf"))
_FORMAT = (
    "-O", "^has_journal,^resize_inode,^metadata_csum,uninit_bg,sparse_super2",
    "-E", "root_owner=0:0",
    "-m", "0",
    "-b", str(_BLOCK_BYTES),
    "-i", "16384",
    "-L", "sandboxd",
    "-U", "5b3f1d0c-7c0e-4d52-8f5e-73616e646278",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Artefact:
    """One file of an image."""

    path: Path
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Package:
    """A Debian package in the image's root file system."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Image:
    """A bootable image; `path` is its own directory, which a later build of the same name does not change."""

    name: str
    digest: str
    input_digest: str
    created: str  # RFC 3339; derived from the inputs, so equal builds have equal times
    path: Path
    kernel: Artefact
    kernel_version: str
    initramfs: Artefact
    root: Artefact
    root_format: str
    min_memory_bytes: int
    packages: tuple[Package, ...]
    inputs: Mapping[str, object]

    @property
    def size_bytes(self) -> int:
        """What the image takes on the disk."""
        return self.kernel.size_bytes + self.initramfs.size_bytes + self.root.size_bytes


class ImageStore:
    """The images below `images_dir`. Every method blocks: `get` and `list` for a millisecond, `verify` for seconds."""

    def __init__(self, images_dir: Path) -> None:
        self._dir = images_dir
        self._parsed: dict[Path, tuple[int, Image]] = {}

    def names(self) -> list[str]:
        """Returns the names that lead to something, sorted; whether each is a sound image is for `get` to say."""
        try:
            return sorted(entry.name for entry in os.scandir(self._dir) if _NAME.fullmatch(entry.name))
        except FileNotFoundError:
            return []

    def list(self) -> list[Image]:
        """Returns the sound images, sorted by name; damaged ones are left out."""
        images = []
        for name in self.names():
            try:
                images.append(self.get(name))
            except (NotFound, HostError):
                continue
        return images

    def get(self, name: str) -> Image:
        """Returns the image that a name leads to now.

        :raises InvalidSpec: this cannot be an image's name.
        :raises NotFound: there is none.
        :raises HostError: its manifest or a file of it is damaged.
        """
        path = self._resolve(name)
        manifest = path / "manifest.json"
        try:
            stamp = manifest.stat().st_mtime_ns
            cached = self._parsed.get(path)
            if cached is not None and cached[0] == stamp:
                return cached[1]
            image = parse_manifest(manifest.read_bytes(), path)
        except FileNotFoundError as e:
            raise _damaged(path, "it has no manifest") from e
        except OSError as e:
            raise HostError(f"cannot read {manifest}: {e.strerror}") from e
        if image.name != name:
            raise _damaged(path, f"its manifest is of an image {image.name!r}")
        self._parsed = {**{p: entry for p, entry in self._parsed.items() if p.exists()}, path: (stamp, image)}
        return image

    def get_build(self, name: str, digest: str) -> Image:
        """Returns the build of an image that has this digest, which may not be the present one.

        :raises NotFound: it is not there any more. :raises HostError: it is damaged.
        """
        builds = [self._dir / name, *sorted((self._dir / ".store").glob(f"{name}{_ENTRY_SUFFIX}"))]
        for path in builds:
            try:
                image = parse_manifest((path / "manifest.json").read_bytes(), path.resolve())
            except OSError:
                continue
            if image.digest == digest:
                return image
        raise NotFound(
            f"the build of image {name} that this sandbox was made from is not there any more", reason="IMAGE_NOT_FOUND"
        )

    def verify(self, image: Image) -> None:
        """Ensures that every file of an image still has the digest that its manifest states.

        :raises HostError: names the first file that does not.
        """
        for artefact in (image.kernel, image.initramfs, image.root):
            try:
                with artefact.path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as e:
                raise _damaged(image.path, f"{artefact.path.name} cannot be read ({e.strerror})") from e
            if found != artefact.sha256:
                raise _damaged(image.path, f"{artefact.path.name} does not have the digest of its manifest")

    def remove(self, name: str) -> None:
        """Removes a name and every build of it. That no virtual machine uses it is the caller's to know.

        :raises InvalidSpec: this cannot be an image's name.
        :raises NotFound: there is none.
        :raises InvalidState: an image is being built just now.
        :raises HostError: files cannot be removed.
        """
        path = self._resolve(name)
        try:
            with self._locked():
                link = self._dir / name
                if link.is_symlink():
                    link.unlink()
                for entry in {path, *(self._dir / ".store").glob(f"{name}{_ENTRY_SUFFIX}")}:
                    shutil.rmtree(entry)
        except OSError as e:
            raise HostError(f"cannot remove image {name}: {e}") from e
        self._parsed.pop(path, None)

    def _resolve(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise InvalidSpec(f"{name[:80]!r} is not an image name: use up to 63 of a-z, 0-9, '.', '_' and '-'")
        path = (self._dir / name).resolve()
        if not path.is_dir():
            known = ", ".join(self.names()) or "none"
            raise NotFound(
                f"no image {name!r} (there are: {known}); build it with `sandboxctl image build {name}`",
                reason="IMAGE_NOT_FOUND",
                image=name,
            )
        return path

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the builder's lock, so that nothing is removed under a build."""
        folder = self._dir / ".store"
        folder.mkdir(exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise InvalidState("an image is being built; try again when that has ended") from e
            yield


def parse_manifest(data: bytes, path: Path) -> Image:
    """Returns the image that a manifest in the directory `path` describes, once all of it has been checked.

    :raises HostError: not a manifest of a known schema, or a file is missing or has another size.
    """
    try:
        manifest = json.loads(data)
        if manifest["schema"] != _SCHEMA:
            raise _damaged(path, f"its manifest has schema {manifest['schema']!r}, this agent knows {_SCHEMA}")
        kernel, initramfs, root = (_artefact(manifest[part], path) for part in ("kernel", "initramfs", "root"))
        image = Image(
            name=_text(manifest["name"], _NAME),
            digest=_text(manifest["digest"], _SHA256),
            input_digest=_text(manifest["input_digest"], _SHA256),
            created=_text(manifest["created"]),
            path=path,
            kernel=kernel,
            kernel_version=_text(manifest["kernel"]["version"]),
            initramfs=initramfs,
            root=root,
            root_format=_text(manifest["root"]["format"], re.compile("erofs|squashfs")),
            min_memory_bytes=_count(manifest["min_memory_bytes"]),
            packages=tuple(Package(_text(p["name"]), _text(p["version"])) for p in manifest["packages"]),
            inputs=cast("Mapping[str, object]", dict(manifest["inputs"])),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise _damaged(path, f"its manifest is not valid ({type(e).__name__}: {e})") from e
    _check_digest(image)
    return image


def _check_digest(image: Image) -> None:
    """The image's digest is that of its files' digests, so a manifest cannot be changed by halves."""
    parts = {"kernel": image.kernel.sha256, "initramfs": image.initramfs.sha256, "root": image.root.sha256}
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()
    if hashlib.sha256(canonical).hexdigest() != image.digest:
        raise _damaged(image.path, "its manifest's digest is not that of its files")


def _artefact(values: dict[str, Any], folder: Path) -> Artefact:
    path = folder / _text(values["file"], _FILE_NAME)
    size = _count(values["size_bytes"])
    try:
        found = path.stat().st_size
    except OSError as e:
        raise _damaged(folder, f"{path.name} is missing") from e
    if found != size:
        raise _damaged(folder, f"{path.name} has {found} bytes, its manifest states {size}")
    return Artefact(path, _text(values["sha256"], _SHA256), size)


def _text(value: object, pattern: re.Pattern[str] | None = None) -> str:
    if not isinstance(value, str) or (pattern is not None and not pattern.fullmatch(value)):
        raise ValueError(f"unexpected value {str(value)[:80]!r}")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"unexpected value {str(value)[:80]!r}")
    return value


def _damaged(path: Path, why: str) -> ImageDamaged:
    name = path.name.rsplit("-", 1)[0]
    return ImageDamaged(
        f"the image in {path} is damaged: {why}; build it again with `sandboxctl image build {name}`", image=name
    )


class DiskMaker:
    """Makes writable disks: sparse files with an empty ext4 file system, copied from a template of the same size.

    :param template_dir: where the templates are kept; created if missing. A few hundred KiB per size in use.
    """

    def __init__(self, template_dir: Path) -> None:
        self._dir = template_dir
        self._formatting = threading.Lock()

    async def make_disk(self, path: Path, size_bytes: int) -> None:
        """Ensures that `path` is a new, empty disk; takes about a millisecond once a disk of this size was made.

        Cancelled or failed, it leaves no file.

        :raises InvalidSpec: a size that no disk can have.
        :raises AlreadyExists: `path` exists.
        :raises ResourceExhausted: the host's disk is full.
        :raises HostError: the file cannot be made, or mkfs.ext4 is missing or failed.
        """
        if not MIN_DISK_BYTES <= size_bytes <= MAX_DISK_BYTES or size_bytes % _BLOCK_BYTES:
            raise InvalidSpec(
                f"a disk cannot have {size_bytes} bytes: use a multiple of {_BLOCK_BYTES} "
                f"from {MIN_DISK_BYTES} to {MAX_DISK_BYTES}",
                reason="INVALID_DISK_SIZE",
            )
        work = asyncio.ensure_future(asyncio.to_thread(self._make, path, size_bytes))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            # The thread cannot be stopped, only waited for.
            await asyncio.wait([work])
            if work.exception() is None:
                await asyncio.to_thread(path.unlink, missing_ok=True)
            raise

    def _make(self, path: Path, size_bytes: int) -> None:
        try:
            copy_sparse(self._template(size_bytes), path)
        except FileExistsError as e:
            raise AlreadyExists(f"{path} exists already; remove it or choose another path") from e
        except OSError as e:
            raise disk_error(path, e) from e

    def _template(self, size_bytes: int) -> Path:
        variant = hashlib.sha256(" ".join((*_FORMAT, *_FOLDERS, *_FILES)).encode()).hexdigest()[:8]
        template = self._dir / f"ext4-{variant}-{size_bytes}.img"
        with self._formatting:
            try:
                os.utime(template)
            except FileNotFoundError:
                self._dir.mkdir(parents=True, exist_ok=True)
                self._format(template, size_bytes)
                self._prune()
        return template

    def _format(self, template: Path, size_bytes: int) -> None:
        fd, name = tempfile.mkstemp(prefix="draft-", dir=self._dir)
        draft = Path(name)
        try:
            os.ftruncate(fd, size_bytes)
            run_mkfs(draft)
            draft.replace(template)
        finally:
            os.close(fd)
            draft.unlink(missing_ok=True)

    def _prune(self) -> None:
        """Removes the templates of sizes that were not asked for in the longest time."""
        templates = sorted(self._dir.glob("ext4-*.img"), key=lambda path: path.stat().st_mtime_ns)
        for template in templates[:-_TEMPLATES_KEPT]:
            template.unlink()


def run_mkfs(path: Path) -> None:
    """Ensures that the file holds a new ext4 file system of the file's own size (mke2fs(8)).

    :raises HostError: mkfs.ext4 is missing or failed.
    :raises OSError: ENOSPC where the host's disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="draft-", dir=path.parent) as name:
        _make_content(Path(name))
        _mkfs(path, *_FORMAT, "-d", name)


def format_volume(path: Path, owner: int) -> None:
    """Ensures that the file holds a new ext4 file system that survives crashes, whose root belongs to `owner`.

    :raises HostError: mkfs.ext4 is missing or failed. :raises OSError: ENOSPC where the host's disk is full.
    """
    _mkfs(path, "-m", "0", "-b", str(_BLOCK_BYTES), "-E", f"root_owner={owner}:{owner}", "-L", "volume")


def _mkfs(path: Path, *options: str) -> None:
    program = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise HostError("mkfs.ext4 is missing: apt-get install e2fsprogs", reason="PROGRAM_MISSING")
    done = subprocess.run([program, "-q", "-F", *options, str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if os.strerror(errno.ENOSPC) in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise HostError(f"mkfs.ext4 failed with status {done.returncode}: {done.stderr.strip()[-500:]}")


def _make_content(directory: Path) -> None:
    directory.chmod(0o755)
    for folder in _FOLDERS:
        (directory / folder).mkdir(parents=True)
    for path in (directory / "upper", *(directory / folder for folder in _FOLDERS)):
        path.chmod(0o755)
    for file in _FILES:
        (directory / file).touch()
        (directory / file).chmod(0o644)


def disk_error(path: Path, error: OSError) -> AgentError:
    """Returns the error for a disk that cannot be made."""
    if error.errno in NO_SPACE:
        return ResourceExhausted(
            f"the host's disk is full: cannot make {path}; free space or delete sandboxes", reason="DISK_FULL"
        )
    if error.errno == errno.EFBIG:
        return InvalidSpec(f"the host's file system cannot hold a file as large as {path}: ask for a smaller disk")
    return HostError(f"cannot make the disk {path}: {error.strerror}")
