"""Root file system view of a process: a mount namespace with named files of the host only (mount_namespaces(7)).

`enter_root_view` changes the calling thread alone: once unshared, mount namespace and root belong to that thread, and
its children inherit them. So the agent, which must not fork, needs no helper program.
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

# Mount point of the new root until pivot_root: exists on every host, and no file below it is ever bound.
_MOUNT_POINT = "/proc"
# Programs and their libraries; symbolic links of a merged /usr stay links.
SYSTEM = tuple(Path(path) for path in ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache"))


@dataclass(frozen=True, slots=True)
class RootView:
    """Visible files, directories and devices, at their paths on the host, beside `SYSTEM` and an empty /tmp.

    :param owner: UID and GID that own the devices.
    """

    read_only: tuple[Path, ...] = ()
    writable: tuple[Path, ...] = ()
    devices: tuple[Path, ...] = ()
    owner: int = 0


def enter_root_view(view: RootView) -> None:
    """Make `view` the root of the calling thread for the rest of its life.

    :raises OSError: a path of the view does not exist, or a mount was refused.
    """
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    devices = [(path, path.stat()) for path in view.devices]
    mount("view", _MOUNT_POINT, "tmpfs", MS_NOSUID | MS_NOEXEC, "size=1m,mode=755")
    root = Path(_MOUNT_POINT)
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
    """Return the paths that lie below none of the others: binding a directory binds its content."""
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
        return  # already visible through a directory bound before
    flags = MS_NOSUID | MS_NODEV | (0 if writable else MS_RDONLY)
    mount(source, target, "", MS_BIND | MS_REC)
    mount("none", target, "", MS_BIND | MS_REMOUNT | flags)


def _make_device(target: Path, facts: os.stat_result, owner: int) -> None:
    """Make a device node that `owner` may open, whatever the mode of the host's node is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(target, stat.S_IFCHR | 0o600, facts.st_rdev)
    os.chown(target, owner, owner)


def _pivot(root: Path) -> None:
    os.chdir(root)
    pivot_root(".", ".")
    umount(".", MNT_DETACH)  # the host's root, which is below the new one
    os.chdir("/")
    mount("none", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NOEXEC)
