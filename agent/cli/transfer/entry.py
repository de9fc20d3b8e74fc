"""Facts of one file or directory that `cp` copies, on this machine or in a sandbox. Paths are bytes."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from enum import StrEnum

_HOME = b"/home/sandbox"  # the API resolves relative paths from here


class Kind(StrEnum):
    """Type of a file, as far as `cp` distinguishes it."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Entry:
    """Path and metadata of one file.

    :param mode: permission bits.
    :param mtime_ns: modification time in ns since the epoch.
    :param target: of a symbolic link.
    """

    path: bytes
    kind: Kind
    size_bytes: int
    mode: int
    mtime_ns: int
    target: bytes = b""


def kind_of(mode: int) -> Kind:
    """Return the kind for an st_mode."""
    if stat.S_ISREG(mode):
        return Kind.FILE
    return Kind.DIRECTORY if stat.S_ISDIR(mode) else Kind.LINK if stat.S_ISLNK(mode) else Kind.OTHER


def local_entry(path: bytes, *, follow: bool) -> Entry:
    """Return the facts of a file on this machine.

    :raises OSError: it does not exist, or may not be read.
    """
    facts = os.stat(path, follow_symlinks=follow)  # noqa: PTH116  bytes of any kind
    target = os.readlink(path) if stat.S_ISLNK(facts.st_mode) else b""  # noqa: PTH115  bytes of any kind
    return Entry(path, kind_of(facts.st_mode), facts.st_size, stat.S_IMODE(facts.st_mode), facts.st_mtime_ns, target)


def guest_path(path: str) -> bytes:
    """Return the absolute path in the guest; relative ones start in the home directory, as in the API."""
    raw = os.fsencode(path)
    return raw if raw.startswith(b"/") else b"/".join((_HOME, raw)) if raw else _HOME


def copy_name(path: str) -> bytes:
    """Return the name of a copy of `path` inside a target directory, as cp(1) chooses it.

    b"" for "." and "/" and paths that end in them: their contents are copied into the target itself.
    """
    name = os.fsencode(os.path.basename(path.rstrip("/")))  # noqa: PTH119  bytes of any kind
    return b"" if name in (b".", b"..") else name
