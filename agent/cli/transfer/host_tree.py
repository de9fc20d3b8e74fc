"""A folder of this machine that a hostile sandbox's files are written into.

Everything is done by descriptors, name by name, and no symbolic link is followed below the folder: one that the
download made, or that was there, cannot lead a later file elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from agent.cli.errors import CliError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# A set-user-ID program of the sandbox's making must not become one of this machine.
MODE_MASK = 0o777
Names = tuple[bytes, ...]


def names_below(root: bytes, path: bytes) -> Names:
    """Returns the names that lead from a folder of the sandbox to what it listed there.

    :raises CliError: the path is not below the folder, or has names in it that no listing has.
    """
    prefix = root.rstrip(b"/") + b"/"
    names = tuple(path.removeprefix(prefix).split(b"/"))
    if not path.startswith(prefix) or any(not _plain(name) for name in names):
        shown = os.fsdecode(path)[:200].encode(errors="replace").decode()
        raise CliError(
            f"the sandbox lists {shown!r} in {os.fsdecode(root)!r}; nothing of that is written",
            reason="HOSTILE_LISTING",
        )
    return names


def _plain(name: bytes) -> bool:
    return name not in (b"", b".", b"..") and b"/" not in name and b"\0" not in name


class HostTree:
    """Writes below `root`, which exists and is trusted. Names are checked by `names_below` or the user's own."""

    def __init__(self, root: str) -> None:
        self._root = root

    def shown(self, names: Names) -> str:
        """Returns the path for a message."""
        return os.path.join(self._root, *(os.fsdecode(name) for name in names))  # noqa: PTH118  bytes of any kind

    @contextmanager
    def _folder(self, names: Names) -> Iterator[int]:
        fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for index, name in enumerate(names, 1):
                try:
                    inner = os.open(name, _FOLDER, dir_fd=fd)
                except OSError as error:
                    if error.errno in (errno.ELOOP, errno.ENOTDIR):
                        raise CliError(
                            f"{self.shown(names[:index])} is not a folder here, and links are not followed",
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

    def make_folder(self, names: Names) -> bool:
        """Ensures that a folder is there; returns whether it is new. It is ours alone until `set_folder_facts`."""
        with self._folder(names[:-1]) as parent:
            try:
                os.mkdir(names[-1], 0o700, dir_fd=parent)
            except FileExistsError:
                with self._folder(names):
                    return False
            except OSError as error:
                raise self._named(error, names) from None
        return True

    @contextmanager
    def new_file(self, names: Names) -> Iterator[int]:
        """Yields a descriptor of an empty file, mode 0600 if it is new. What is no regular file gives way to it."""
        with self._folder(names[:-1]) as parent:
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
        """Makes a symbolic link, in the place of what is there unless that is a folder. Nothing is read through it."""
        with self._folder(names[:-1]) as parent:
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

    def set_folder_facts(self, names: Names, mode: int, mtime_ns: int) -> None:
        """Sets permission bits and modification time of a folder, once it is full."""
        with self._folder(names) as fd:
            set_facts(fd, mode, mtime_ns)


def set_facts(fd: int, mode: int, mtime_ns: int) -> None:
    """Sets permission bits (without set-user-ID and its like) and modification time."""
    os.fchmod(fd, mode & MODE_MASK)
    with contextlib.suppress(OverflowError, OSError):  # a guest may say any time
        os.utime(fd, ns=(mtime_ns, mtime_ns))
