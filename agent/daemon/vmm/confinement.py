"""A VMM that is another user than the agent: what it sees of the host, and what it is lent to write to."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from agent.common.errors import VmmError
from agent.daemon.host.process import Confinement
from agent.daemon.host.root_view import View
from agent.daemon.vmm.driver import VmSpec


def confinement_of(spec: VmSpec) -> Confinement:
    """Returns whom the VMM of a VM runs as."""
    return Confinement() if spec.uid is None else Confinement(spec.uid, spec.uid)


def view_of(
    spec: VmSpec, binary: str, devices: Iterable[str], *, read_only: Iterable[Path] = (), writable: Iterable[Path] = ()
) -> View | None:
    """Returns what the VMM of a VM sees; None for one that runs as the agent's own user: all that the agent does."""
    if spec.uid is None:
        return None
    seen = [Path(shutil.which(binary) or binary), *read_only]
    seen += [disk.path for disk in spec.disks if disk.read_only]
    seen += [spec.kernel, spec.initramfs] if spec.restore_from is None else [spec.restore_from]
    written = [disk.path for disk in spec.disks if not disk.read_only]
    if spec.memory_file is not None:
        (seen if spec.memory_file.private else written).append(spec.memory_file.path)
    if spec.save_root is not None:
        written.append(spec.save_root)
    present = tuple(Path(device) for device in devices if Path(device).exists())
    return View(tuple(seen), (*written, *writable), present, spec.uid)


def lend(spec: VmSpec) -> None:
    """Makes the VMM's user own the files that it writes to. :raises VmmError: one cannot be given."""
    if spec.uid is None:
        return
    written = [disk.path for disk in spec.disks if not disk.read_only]
    for path in (*written, *_shared_ram(spec)):
        lend_path(spec.uid, path)


def lend_path(uid: int | None, path: Path) -> None:
    """Makes the VMM's user own a file, or a directory that it is to fill. :raises VmmError: it cannot be given."""
    if uid is None:
        return
    try:
        os.chown(path, uid, uid, follow_symlinks=False)
    except OSError as error:
        raise VmmError(f"cannot give {path} to user {uid}: {error}", reason="VMM_NOT_STARTED") from error


def take_back(spec: VmSpec) -> None:
    """Makes the agent own again what outlives the VM: a template's RAM, and volumes. Idempotent.

    Clones will share that RAM, and an owner could write to it whatever its mode says.
    """
    if spec.uid is None:
        return
    durable = [disk.path for disk in spec.disks if disk.durable]
    for path in (*_shared_ram(spec), *durable):
        with contextlib.suppress(FileNotFoundError):
            os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)


def take_directory(directory: Path, names: Iterable[str]) -> None:
    """Makes the agent own a directory that the VMM filled, readable for the VMMs of others.

    Whoever has taken over the VMM can put anything there, links included: only plain files of these names are taken.

    :raises VmmError: something else is there.
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
                raise VmmError(f"the snapshot's {name} is not what it must be", reason="SNAPSHOT_FAILED")
            os.fchown(fd, os.geteuid(), os.getegid())
            os.fchmod(fd, 0o444)
        finally:
            os.close(fd)


def _shared_ram(spec: VmSpec) -> list[Path]:
    return [spec.memory_file.path] if spec.memory_file is not None and not spec.memory_file.private else []
