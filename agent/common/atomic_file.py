"""Files that are replaced in one step: a reader, or a host that crashes, finds the old content or the new one.

A new content is written beside the file and renamed over it (rename(2)). The temporary file has a name of its own,
".<name>.<random>.tmp", and is never opened through a link, so that other users of the directory can neither be
overwritten nor redirect the writer; a process that is killed while it writes leaves it behind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Draft(NamedTuple):
    """A temporary file, empty and open for writing, that becomes another one."""

    file: IO[bytes]
    path: Path


def write_atomically(
    path: Path, data: bytes, *, mode: int, durable: bool, owner: tuple[int, int] | None = None
) -> None:
    """Replace the content of `path` in one step; blocks. The parameters are those of `replacement`.

    :raises OSError: it failed; the old file is as it was, and no temporary file is left.
    """
    with replacement(path, mode=mode, durable=durable, owner=owner) as draft:
        draft.file.write(data)


@contextmanager
def replacement(path: Path, *, mode: int, durable: bool, owner: tuple[int, int] | None = None) -> Iterator[Draft]:
    """Yield a new file that takes the place of `path` once the block has ended without an exception.

    :param mode: permission bits of the file, whatever the umask and the mode of the file that it replaces.
    :param durable: whether the content outlives a power cut from here on: file and directory are synced.
    :param owner: user and group of the file; None: those of the process.
    :raises OSError: it failed; the old file is as it was, and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, _FLAGS, 0o600)
    try:
        with os.fdopen(descriptor, "r+b", closefd=False) as file:
            yield Draft(file, temporary)
        if owner is not None:
            os.fchown(descriptor, *owner)
        os.fchmod(descriptor, mode)  # after the owner: chown(2) clears bits
        if durable:
            os.fsync(descriptor)
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(descriptor)
    if durable:
        sync(path.parent)


def publish_directory(draft: Path, path: Path) -> None:
    """Rename a finished directory so that its content and its new name outlive a power cut; blocks.

    :raises OSError: it failed; `draft` has its old name.
    """
    for parent, _, names in os.walk(draft, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
    draft.rename(path)
    try:
        sync(path.parent)
    except OSError:
        path.rename(draft)
        raise


def sync(path: Path) -> None:
    """Write a file's content, or a directory's entries, to the disk (fsync(2)); blocks.

    :raises OSError: it cannot be opened or written.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
