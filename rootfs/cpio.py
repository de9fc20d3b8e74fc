"""Write cpio archives in the "newc" format, which the kernel unpacks as its initramfs.

Format: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import io
import stat


class CpioWriter:
    """Archive in memory. Reproducible: inode numbers count up, and times are 0."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._inode = 0

    def folder(self, path: str) -> None:
        """Add a directory, mode 0755."""
        self._add(path, stat.S_IFDIR | 0o755, b"")

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int) -> None:
        """Add a character device node, mode 0600."""
        self._add(path, stat.S_IFCHR | 0o600, b"", (major, minor))

    def finish(self) -> bytes:
        """Return the archive with its trailer, padded to 512 bytes."""
        self._add("TRAILER!!!", 0, b"")
        self._pad(512)
        return self._out.getvalue()

    def _add(self, path: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        name = path.lstrip("/").encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0)
        self._out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + name)
        self._pad(4)
        self._out.write(data)
        self._pad(4)

    def _pad(self, unit: int) -> None:
        self._out.write(b"\0" * (-self._out.tell() % unit))
