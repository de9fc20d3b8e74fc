"""Files of a template: manifest, digests, and detection of changes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from agent.common.atomic_file import publish_directory
from agent.common.errors import HostError
from agent.daemon.sandbox.machine.vm_shape import Shape

RAM = "ram"
VMM = "vmm"
MANIFEST = "manifest.json"
_SCHEMA = 1


class TemplateDamaged(HostError):
    """A template does not match its manifest; it must be rebuilt."""

    default_reason = "TEMPLATE_DAMAGED"


@dataclass(frozen=True, slots=True)
class Template:
    """A saved VM for clones to start from.

    :param image: name of the image that it was built from.
    :param size_bytes: disk space, without holes.
    :param create_time: seconds since 1970; `last_used` likewise.
    """

    path: Path
    shape: Shape
    image: str
    size_bytes: int
    create_time: float
    last_used: float

    @property
    def digest(self) -> str:
        """Name of the template: `Shape.digest`."""
        return self.path.name

    @property
    def ram(self) -> Path:
        """RAM image, which clones map copy-on-write."""
        return self.path / RAM

    @property
    def vmm(self) -> Path:
        """Directory of the device state that the VMM wrote."""
        return self.path / VMM


class _File(msgspec.Struct, frozen=True):
    sha256: str
    size_bytes: int


class _Manifest(msgspec.Struct, kw_only=True):
    """What is known of the files of a template, as it is kept; `files` by path below the template's directory."""

    schema: int = _SCHEMA
    shape: Shape
    image: str
    create_time: float
    files: dict[str, _File]


def write_manifest(path: Path, shape: Shape, image: str, create_time: float) -> None:
    """Write the manifest of the files in `path`, and make all of them read-only; `publish` syncs them. Blocks.

    :raises OSError: a file cannot be read or written.
    """
    files = {name: _facts(path / name) for name in _names(path)}
    manifest = _Manifest(shape=shape, image=image, create_time=create_time, files=files)
    data = msgspec.json.encode(manifest, order="sorted")
    (path / MANIFEST).write_bytes(msgspec.json.format(data, indent=1) + b"\n")
    for name in (*files, MANIFEST):
        (path / name).chmod(0o444)


def _names(path: Path) -> list[str]:
    """Return the files of a template without its manifest, as paths relative to it."""
    found = [str(entry.relative_to(path)) for entry in path.rglob("*") if not entry.is_dir()]
    return sorted(name for name in found if name != MANIFEST)


def _facts(path: Path) -> _File:
    with path.open("rb") as file:
        return _File(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def publish(draft: Path, path: Path) -> Template:
    """Rename a complete draft to `path`, durably, replacing an older template there; return the template. Blocks.

    :raises OSError: the draft cannot be synced or renamed.
    :raises TemplateDamaged: its manifest cannot be read back.
    """
    replaced = draft.with_name(
        f"{draft.name}-replaced"
    )  # named like a draft, so that a killed agent's successor removes it
    with contextlib.suppress(FileNotFoundError):
        path.rename(replaced)
    publish_directory(draft, path)
    shutil.rmtree(replaced, ignore_errors=True)
    return read(path)


def read(path: Path) -> Template:
    """Return the template in a directory without verifying digests. Blocks.

    :raises TemplateDamaged: the manifest is missing or malformed.
    """
    return _parse(path, _manifest(path))


def _manifest(path: Path) -> _Manifest:
    try:
        values = msgspec.json.decode((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TemplateDamaged(f"its manifest cannot be read: {error}") from error
    if not isinstance(values, dict) or values.get("schema") != _SCHEMA:
        raise TemplateDamaged("its manifest is of another version")
    try:
        manifest = msgspec.convert(values, _Manifest)
    except msgspec.ValidationError as error:
        raise TemplateDamaged(f"its manifest does not fit: {error}") from error
    if unknown := set(values["shape"]) - {field.name for field in dataclasses.fields(Shape)}:
        raise TemplateDamaged(f"its manifest does not fit: a shape has no {', '.join(sorted(unknown))}")
    return manifest


def _parse(path: Path, manifest: _Manifest) -> Template:
    try:
        size = sum((path / name).stat().st_blocks * 512 for name in manifest.files)
        last_used = (path / MANIFEST).stat().st_atime
    except (OSError, ValueError) as error:  # ValueError: no path, with a NUL in it say
        raise TemplateDamaged(f"its manifest does not fit: {error}") from error
    return Template(path, manifest.shape, manifest.image, size, manifest.create_time, last_used)


def verify(path: Path, shape: Shape) -> Template:
    """Return the template in a directory after comparing the digest of every file. Blocks for a fraction of a second.

    :raises TemplateDamaged: shape or a digest differs; the message says which.
    """
    manifest = _manifest(path)
    template = _parse(path, manifest)
    if template.shape != shape:
        raise TemplateDamaged("it is of another VMM, CPU, image or size")
    for name, expected in manifest.files.items():
        try:
            found = _facts(path / name)
        except OSError as error:
            raise TemplateDamaged(f"{name} cannot be read: {error}") from error
        if found != expected:
            raise TemplateDamaged(f"{name} does not have the digest of the manifest")
    return template


def stamps(template: Template) -> tuple[object, ...]:
    """Return a value that changes whenever a file of the template is written, replaced or removed. Blocks briefly."""
    found: list[object] = []
    for path in sorted([template.ram, *template.vmm.glob("*")]):
        try:
            facts = path.stat()
        except OSError:
            found.append((path.name, None))
        else:
            found.append((path.name, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))
    return tuple(found)


def touch(template: Template) -> None:
    """Record the time of use, as the access time of the manifest."""
    manifest = template.path / MANIFEST
    with contextlib.suppress(OSError):
        os.utime(manifest, ns=(time.time_ns(), manifest.stat().st_mtime_ns))
