"""What a process of the host gets to see of it: a root of its own that has only what is named (mount_namespaces(7)).

`enter` changes the calling thread alone: mount namespace and root belong to it once they are unshared, and what it
starts begins there. So the agent, which must not fork, needs no helper program for it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from agent.daemon.host.syscalls import (
    CLONE_NEWNS,
    MNT_DETACH,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    mount,
    pivot_root,
    umount,
    unshare,
)

# Covered by the new root until it is the root: it is there on every host, and nothing of it is ever bound.
_PLACE = "/proc"
# Programs and their libraries; links of a merged /usr stay links.
SYSTEM = tuple(Path(path) for path in ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache"))


@dataclass(frozen=True, slots=True)
class View:
    """Files and directories at the paths that they have on the host; devices by their paths; an empty /tmp.

    :param owner: the user who may open the devices.
    """

    read_only: tuple[Path, ...] = ()
    writable: tuple[Path, ...] = ()
    devices: tuple[Path, ...] = ()
    owner: int = 0


def enter(view: View) -> None:
    """Gives the calling thread the view for its root, for good. :raises OSError: something of it is not there."""
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    devices = [(path, path.stat()) for path in view.devices]
    mount("view", _PLACE, "tmpfs", MS_NOSUID | MS_NOEXEC, "size=1m,mode=755")
    root = Path(_PLACE)
    for path in SYSTEM:
        _bind(path, root, writable=False)
    for path in _outermost(view.read_only):
        _bind(path, root, writable=False)
    for path in _outermost(view.writable):
        _bind(path, root, writable=True)
    for path, facts in devices:
        _make_device(root / path.relative_to("/"), facts, view.owner)
    (root / "tmp").mkdir(exist_ok=True)
    (root / "tmp").chmod(0o755)
    _pivot(root)


def _outermost(paths: Iterable[Path]) -> list[Path]:
    """Returns those that lie in none of the others: they are there with it."""
    chosen: list[Path] = []
    for path in sorted(set(paths)):
        if not any(path.is_relative_to(outer) for outer in chosen):
            chosen.append(path)
    return chosen


def _bind(source: Path, root: Path, *, writable: bool) -> None:
    target = root / source.relative_to("/")
    if source in SYSTEM:
        if source.is_symlink():
            target.symlink_to(source.readlink())
            return
        if not source.exists():
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        target.mkdir(exist_ok=True)
    elif not target.exists():
        target.touch()
    elif not writable:
        return  # it is there with a directory that was bound before
    flags = MS_NOSUID | MS_NODEV | (0 if writable else MS_RDONLY)
    mount(source, target, "", MS_BIND | MS_REC)
    mount("none", target, "", MS_BIND | MS_REMOUNT | flags)


def _make_device(target: Path, facts: os.stat_result, owner: int) -> None:
    """A node of its own: the host's may be open to nobody but root, and stays so."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(target, stat.S_IFCHR | 0o600, facts.st_rdev)
    os.chown(target, owner, owner)


def _pivot(root: Path) -> None:
    os.chdir(root)
    pivot_root(".", ".")
    umount(".", MNT_DETACH)  # the host's root, which is below the new one
    os.chdir("/")
    mount("none", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NOEXEC)
