"""Log file of bounded size for the output of a VM: neither a guest nor a VMM must fill the host's disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

# The VMM's user can write to the directory of some logs: do not follow a link there, nor wait for a reader of a FIFO.
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK


class RotatingLog:
    """Appends to a file; at half of `limit_bytes` the file becomes `<name>.1`, replacing an earlier one.

    The file is opened for each piece, so that a failure (full disk, no free descriptor, directory removed) loses that
    piece only: the VM and the rest of its output do not depend on it.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path = path
        self._old_path = path.with_name(path.name + ".1")
        self._half_bytes = max(limit_bytes // 2, 1)

    def create(self) -> None:
        """Create the file unless it exists; a failure is ignored."""
        with contextlib.suppress(OSError):
            self._open().close()

    def append(self, data: bytes) -> None:
        """Append output; a piece that cannot be written is lost."""
        data = data[-2 * self._half_bytes :]
        for start in range(0, len(data), self._half_bytes):
            with contextlib.suppress(OSError):
                self._append_piece(data[start : start + self._half_bytes])

    def _append_piece(self, piece: bytes) -> None:
        if self._size_bytes() + len(piece) > self._half_bytes:
            self._path.replace(self._old_path)
        with self._open() as file:
            file.write(piece)

    def _size_bytes(self) -> int:
        try:
            return self._path.lstat().st_size
        except FileNotFoundError:
            return 0

    def _open(self) -> IO[bytes]:
        return open(self._path, "ab", opener=lambda path, flags: os.open(path, flags | _FLAGS, 0o666))

    def tail(self, limit_bytes: int) -> bytes:
        """Return the last `limit_bytes` of output."""
        return _read_tail((self._path, self._old_path), limit_bytes)


def _read_tail(newest_first: Sequence[Path], limit_bytes: int) -> bytes:
    """Return the last `limit_bytes` of files that continue each other; a missing file counts as empty."""
    kept = b""
    for path in newest_first:
        with contextlib.suppress(OSError), path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (limit_bytes - len(kept))))
            kept = file.read() + kept
        if len(kept) >= limit_bytes:
            break
    return kept[-limit_bytes:] if limit_bytes else b""
