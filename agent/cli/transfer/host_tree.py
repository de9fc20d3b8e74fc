"""A directory of this machine into which the files of a hostile sandbox are written.

Every path is opened name by name relative to descriptors (openat(2) with O_NOFOLLOW), so no symbolic link below the
directory, downloaded or older, can redirect a write to another place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from agent.cli.errors import CliError

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# Drops set-user-ID and set-group-ID: a program from a sandbox must not get them on this machine.
MODE_MASK = 0o777
Names = tuple[bytes, ...]


def names_below(root: bytes, path: bytes) -> Names:
    """Return the names of `path` relative to the directory `root`, both of the sandbox.

    :raises CliError: `path` is not below `root`, or has "", ".", ".." or NUL in its names.
    """
    prefix = root.rstrip(b"/") + b"/"
    names = tuple(path.removeprefix(prefix).split(b"/"))
    if not path.startswith(prefix) or any(not _plain(name) for name in names):
        shown = os.fsdecode(path)[:200].encode(errors="replace").decode()
        raise CliError(
            f"the sandbox lists {shown!r} in {os.fsdecode(root)!r}; this path is not written",
            reason="HOSTILE_LISTING",
        )
    return names


def _plain(name: bytes) -> bool:
    return name not in (b"", b".", b"..") and b"/" not in name and b"\0" not in name


class HostTree:
    """Writes files below `root`, an existing directory that the user chose.

    Names come from the user, or are checked by `names_below`.
    """

    def __init__(self, root: str) -> None:
        self._root = root

    def shown(self, names: Names) -> str:
        """Return the path for an error message."""
        return os.path.join(self._root, *(os.fsdecode(name) for name in names))  # noqa: PTH118  bytes of any kind

    @contextmanager
    def _directory(self, names: Names) -> Iterator[int]:
        fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for index, name in enumerate(names, 1):
                try:
                    inner = os.open(name, _DIRECTORY, dir_fd=fd)
                except OSError as error:
                    if error.errno in (errno.ELOOP, errno.ENOTDIR):
                        raise CliError(
                            f"{self.shown(names[:index])} is not a directory here, and symbolic links are not followed",
                            reason="NOT_A_FOLDER",
                        ) from None
                    raise self._named(error, names[:index]) from None
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)

    def _named(self, error: OSError, names: Names) -> OSError:
        return OSError(error.errno, os.strerror(error.errno or 0), self.shown(names))

    def make_directory(self, names: Names) -> bool:
        """Create a directory unless it exists; return whether it is new. A new one has mode 0700."""
        with self._directory(names[:-1]) as parent:
            try:
                os.mkdir(names[-1], 0o700, dir_fd=parent)
            except FileExistsError:
                with self._directory(names):
                    return False
            except OSError as error:
                raise self._named(error, names) from None
        return True

    @contextmanager
    def new_file(self, names: Names) -> Iterator[int]:
        """Yield a descriptor of an empty file, mode 0600 if new. Replaces a link or device; a directory is an error."""
        with self._directory(names[:-1]) as parent:
            try:
                fd = self._open_file(names, parent)
            except OSError as error:
                raise self._named(error, names) from None
        try:
            yield fd
        finally:
            os.close(fd)

    def _open_file(self, names: Names, parent: int) -> int:
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(names[-1], dir_fd=parent, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(found.st_mode):
                os.unlink(names[-1], dir_fd=parent)
        fd = os.open(names[-1], _NEW_FILE, 0o600, dir_fd=parent)
        os.ftruncate(fd, 0)
        return fd

    def make_link(self, names: Names, target: bytes, mtime_ns: int) -> None:
        """Create a symbolic link, in place of an existing file or link; an existing directory is an error."""
        with self._directory(names[:-1]) as parent:
            try:
                try:
                    os.symlink(target, names[-1], dir_fd=parent)
                except FileExistsError:
                    os.unlink(names[-1], dir_fd=parent)
                    os.symlink(target, names[-1], dir_fd=parent)
                with contextlib.suppress(OverflowError, OSError):
                    os.utime(names[-1], ns=(mtime_ns, mtime_ns), dir_fd=parent, follow_symlinks=False)
            except OSError as error:
                raise self._named(error, names) from None

    def set_directory_metadata(self, names: Names, mode: int, mtime_ns: int) -> None:
        """Set permission bits and modification time of a directory; call it after the last write in it."""
        with self._directory(names) as fd:
            set_metadata(fd, mode, mtime_ns)


def set_metadata(fd: int, mode: int, mtime_ns: int) -> None:
    """Set the permission bits (never set-user-ID, set-group-ID or sticky) and the modification time."""
    os.fchmod(fd, mode & MODE_MASK)
    with contextlib.suppress(OverflowError, OSError):  # a guest can report any time
        os.utime(fd, ns=(mtime_ns, mtime_ns))
