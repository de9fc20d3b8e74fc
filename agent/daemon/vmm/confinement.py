"""Confinement of a VMM that runs as another user than the agent: its root view, and the files granted to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from agent.common.errors import VmmError
from agent.daemon.host.process import Confinement
from agent.daemon.host.root_view import RootView
from agent.daemon.vmm.driver import VmSpec


def confinement_of(spec: VmSpec) -> Confinement:
    """Return the privileges of a VM's VMM."""
    return Confinement() if spec.uid is None else Confinement(spec.uid, spec.uid)


def root_view_of(
    spec: VmSpec, binary: str, devices: Iterable[str], *, read_only: Iterable[Path] = (), writable: Iterable[Path] = ()
) -> RootView | None:
    """Return the root view of a VM's VMM; None, the whole host, for one that runs as the agent's user.

    :param devices: device nodes to include where they exist.
    """
    if spec.uid is None:
        return None
    visible = [Path(shutil.which(binary) or binary), *read_only]
    visible += [disk.path for disk in spec.disks if disk.read_only]
    visible += [spec.kernel, spec.initramfs] if spec.restore_from is None else [spec.restore_from]
    owned = [disk.path for disk in spec.disks if not disk.read_only]
    if spec.memory_file is not None:
        (visible if spec.memory_file.private else owned).append(spec.memory_file.path)
    if spec.save_root is not None:
        owned.append(spec.save_root)
    present = tuple(Path(device) for device in devices if Path(device).exists())
    return RootView(tuple(visible), (*owned, *writable), present, spec.uid)


def grant(spec: VmSpec) -> None:
    """Make the VMM's user own the files that the VMM writes.

    :raises VmmError: the owner of a file cannot be changed.
    """
    if spec.uid is None:
        return
    disks = [disk.path for disk in spec.disks if not disk.read_only]
    for path in (*disks, *_shared_ram(spec)):
        grant_path(spec.uid, path)


def grant_path(uid: int | None, path: Path) -> None:
    """Make the VMM's user own a file, or a directory that the VMM will fill; `uid` None: nothing to do.

    :raises VmmError: the owner cannot be changed.
    """
    if uid is None:
        return
    try:
        os.chown(path, uid, uid, follow_symlinks=False)
    except OSError as error:
        raise VmmError(f"cannot give {path} to user {uid}: {error}", reason="VMM_NOT_STARTED") from error


def reclaim(spec: VmSpec) -> None:
    """Make the agent own again the files that outlive the VM: a template's RAM, and volumes. Idempotent.

    Clones will share that RAM, and an owner could write to it whatever its mode says.
    """
    if spec.uid is None:
        return
    durable = [disk.path for disk in spec.disks if disk.durable]
    for path in (*_shared_ram(spec), *durable):
        with contextlib.suppress(FileNotFoundError):
            os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)


def reclaim_directory(directory: Path, names: Iterable[str]) -> None:
    """Make the agent own a directory that the VMM filled, and the files in it readable for other VMMs.

    An attacker in control of the VMM can put anything there, links included: only regular files of the given names are
    accepted.

    :raises VmmError: the directory has other entries (SNAPSHOT_FAILED).
    """
    os.chown(directory, os.geteuid(), os.getegid())
    directory.chmod(0o755)
    found = sorted(entry.name for entry in directory.iterdir())
    if found != sorted(names):
        raise VmmError(f"the snapshot consists of {', '.join(found)}", reason="SNAPSHOT_FAILED")
    for name in found:
        try:
            fd = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise VmmError(f"the snapshot cannot be read: {error}", reason="SNAPSHOT_FAILED") from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise VmmError(f"the snapshot's {name} is not a regular file", reason="SNAPSHOT_FAILED")
            os.fchown(fd, os.geteuid(), os.getegid())
            os.fchmod(fd, 0o444)
        finally:
            os.close(fd)


def _shared_ram(spec: VmSpec) -> list[Path]:
    return [spec.memory_file.path] if spec.memory_file is not None and not spec.memory_file.private else []
