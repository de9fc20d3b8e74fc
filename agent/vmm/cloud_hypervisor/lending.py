"""What a VMM that is another user than the agent writes to: its disks, and the RAM of a template in the making."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from agent.errors import VmmError
from agent.proc import Confinement
from agent.vmm.api import VmSpec
from agent.vmm.cloud_hypervisor.config import is_template


def lend(spec: VmSpec, confinement: Confinement) -> None:
    """Makes the VMM's user own the files that it writes to. :raises VmmError: one cannot be given."""
    if confinement.uid is None:
        return
    written = [disk.path for disk in spec.disks if not disk.read_only]
    try:
        for path in (*written, *_shared_ram(spec)):
            os.chown(path, confinement.uid, confinement.gid, follow_symlinks=False)
    except OSError as error:
        raise VmmError(f"cannot give {path} to user {confinement.uid}: {error}", reason="VMM_NOT_STARTED") from error


def lend_path(confinement: Confinement, path: Path) -> None:
    """Makes the VMM's user own a directory that it is to fill. :raises VmmError: it cannot be given."""
    if confinement.uid is None:
        return
    try:
        os.chown(path, confinement.uid, confinement.gid, follow_symlinks=False)
    except OSError as error:
        raise VmmError(f"cannot give {path} to user {confinement.uid}: {error}", reason="SNAPSHOT_FAILED") from error


def take_back(spec: VmSpec, confinement: Confinement) -> None:
    """Makes the agent own a template's RAM again, once its VMM is gone. Idempotent.

    Clones will share it, and an owner could write to it whatever its mode says. Disks go with their VM.
    """
    if confinement.uid is None:
        return
    for path in _shared_ram(spec):
        with contextlib.suppress(FileNotFoundError):
            os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)


def _shared_ram(spec: VmSpec) -> list[Path]:
    return [spec.memory_file.path] if spec.memory_file is not None and is_template(spec) else []
