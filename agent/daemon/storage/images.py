"""Store of the images that VMs boot: kernel, initramfs and read-only root file system.

The builder (`rootfs/`) makes them; its manifest is the only interface between both:

    <images_dir>/<name> -> .store/<name>-<12 hex digits>/{manifest.json,vmlinux,initramfs,root.erofs}
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from agent.common.errors import AgentError, HostError, ImageDamaged, InvalidSpec, InvalidState, NotFound

_SCHEMA = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_ENTRY_SUFFIX = "-" + "[0-9a-f]" * 12


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
    """Bootable image; `path` is the directory of this build, which a later build of the same name does not change."""

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
        """Size of the image's files."""
        return self.kernel.size_bytes + self.initramfs.size_bytes + self.root.size_bytes


_Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Versioned(msgspec.Struct):
    schema: int


class _File(msgspec.Struct):
    file: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z")]  # never out of the image's directory
    sha256: _Sha256
    size_bytes: _Count


class _Kernel(_File):
    version: str


class _Root(_File):
    format: Literal["erofs", "squashfs"]


class _Manifest(msgspec.Struct):
    """The builder's manifest, schema 1 (rootfs/README.md)."""

    name: Annotated[str, msgspec.Meta(pattern=rf"\A{_NAME.pattern}\Z")]
    digest: _Sha256
    input_digest: _Sha256
    created: str
    kernel: _Kernel
    initramfs: _File
    root: _Root
    min_memory_bytes: _Count
    packages: tuple[Package, ...]
    inputs: dict[str, object]


class ImageStore:
    """Images below `images_dir`. Every method blocks: `get` and `list` for about 1 ms, `verify` for seconds."""

    def __init__(self, images_dir: Path) -> None:
        self._dir = images_dir
        self._parsed: dict[Path, tuple[int, Image]] = {}

    def names(self) -> list[str]:
        """Return the names of all entries, sorted; `get` checks whether an entry is a valid image."""
        try:
            return sorted(entry.name for entry in os.scandir(self._dir) if _NAME.fullmatch(entry.name))
        except FileNotFoundError:
            return []

    def list(self) -> list[Image]:
        """Return the valid images, sorted by name; damaged ones are left out."""
        images = []
        for name in self.names():
            try:
                images.append(self.get(name))
            except (NotFound, HostError):
                continue
        return images

    def get(self, name: str) -> Image:
        """Return the current build of an image.

        :raises InvalidSpec: the name is malformed.
        :raises NotFound: no image has this name.
        :raises HostError: its manifest or one of its files is damaged.
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

    def boot_files(self, name: str) -> tuple[Path, Path] | None:
        """Return kernel and initramfs of an image; None if it is missing or damaged."""
        try:
            image = self.get(name)
        except AgentError:
            return None
        return image.kernel.path, image.initramfs.path

    def get_build(self, name: str, digest: str) -> Image:
        """Return the build of an image with this digest, also if it is not the current one.

        :raises NotFound: the build was removed.
        :raises HostError: the build is damaged.
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
            f"the build of image {name} that this sandbox was made from was removed", reason="IMAGE_NOT_FOUND"
        )

    def verify(self, image: Image) -> None:
        """Check that every file of an image has the digest of its manifest.

        :raises HostError: a file differs or cannot be read; names the first one.
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
        """Remove an image with all of its builds. The caller ensures that no virtual machine uses it.

        :raises InvalidSpec: the name is malformed.
        :raises NotFound: no image has this name.
        :raises InvalidState: an image is being built.
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
        """Hold the builder's lock, so that nothing is removed during a build."""
        folder = self._dir / ".store"
        folder.mkdir(exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise InvalidState("an image is being built; try again when that has ended") from e
            yield


def parse_manifest(data: bytes, path: Path) -> Image:
    """Return the image that a manifest in the directory `path` describes; checks digest, files and their sizes.

    :raises HostError: the manifest is invalid or of an unknown schema, or a file is missing or has another size.
    """
    try:
        values = msgspec.json.decode(data)
        schema = msgspec.convert(values, _Versioned).schema
        if schema != _SCHEMA:
            raise _damaged(path, f"its manifest has schema {schema}, this agent knows {_SCHEMA}")
        manifest = msgspec.convert(values, _Manifest)
    except (ValueError, RecursionError) as e:
        raise _damaged(path, f"its manifest is not valid: {e}") from e
    image = Image(
        name=manifest.name,
        digest=manifest.digest,
        input_digest=manifest.input_digest,
        created=manifest.created,
        path=path,
        kernel=_artefact(manifest.kernel, path),
        kernel_version=manifest.kernel.version,
        initramfs=_artefact(manifest.initramfs, path),
        root=_artefact(manifest.root, path),
        root_format=manifest.root.format,
        min_memory_bytes=manifest.min_memory_bytes,
        packages=manifest.packages,
        inputs=manifest.inputs,
    )
    _check_digest(image)
    return image


def _check_digest(image: Image) -> None:
    """Check that the image's digest is the digest of its files' digests.

    :raises HostError: the manifest was changed in part.
    """
    parts = {"kernel": image.kernel.sha256, "initramfs": image.initramfs.sha256, "root": image.root.sha256}
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()
    if hashlib.sha256(canonical).hexdigest() != image.digest:
        raise _damaged(image.path, "its manifest's digest is not that of its files")


def _artefact(facts: _File, folder: Path) -> Artefact:
    path = folder / facts.file
    try:
        found = path.stat().st_size
    except OSError as e:
        raise _damaged(folder, f"{path.name} is missing") from e
    if found != facts.size_bytes:
        raise _damaged(folder, f"{path.name} has {found} bytes, its manifest states {facts.size_bytes}")
    return Artefact(path, facts.sha256, facts.size_bytes)


def _damaged(path: Path, why: str) -> ImageDamaged:
    name = path.name.rsplit("-", 1)[0]
    return ImageDamaged(
        f"the image in {path} is damaged: {why}; build it again with `sandboxctl image build {name}`", image=name
    )
