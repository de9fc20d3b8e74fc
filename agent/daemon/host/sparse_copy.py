"""Copy sparse files without filling their holes."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_FICLONE = 0x40049409  # ioctl_ficlone(2)
_COPY_BYTES = 1 << 20


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file and keep its holes; share blocks where the file system can (ioctl_ficlone(2)). Blocks.

    :raises FileExistsError: `target` exists.
    :raises OSError: reading or writing failed; `target` is removed.
    """
    with source.open("rb") as reader:
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if not _clone(reader.fileno(), out):
                _copy_extents(reader.fileno(), out)
        except BaseException:
            target.unlink()
            raise
        finally:
            os.close(out)


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as e:
        if e.errno in NO_SPACE:
            raise
        return False
    return True


def _copy_extents(source: int, target: int) -> None:
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    start = end = 0
    while end < size:
        try:
            start = os.lseek(source, end, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        end = os.lseek(source, start, os.SEEK_HOLE)
        while start < end:
            piece = os.pread(source, min(end - start, _COPY_BYTES), start)
            if not piece:
                raise OSError(errno.EIO, "the source became shorter while it was copied")
            start += os.pwrite(target, piece, start)
