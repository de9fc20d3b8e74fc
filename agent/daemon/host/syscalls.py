"""System calls for namespaces, mounts and Landlock; each concerns the calling thread alone where namespaces do."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from agent.common.libc import check, libc

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000  # clone(2)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 8, 32, 4096, 16384  # mount(2)
MS_PRIVATE = 1 << 18
MNT_DETACH = 2  # umount(2)
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_LANDLOCK_CREATE_RULESET = 444  # the same number on all architectures
_LANDLOCK_CREATE_RULESET_VERSION = 1


def unshare(flags: int) -> None:
    """Move the calling thread into new namespaces (unshare(2)).

    :raises OSError: the kernel refused.
    """
    check(libc.unshare(flags), "unshare")


def setns(fd: int, flags: int, what: str = "setns") -> None:
    """Move the calling thread into the namespace of a descriptor (setns(2)).

    :param what: names the namespace in the error.
    :raises OSError: the kernel refused.
    """
    check(libc.setns(fd, flags), what)


def enter_netns(name: str) -> None:
    """Move the calling thread into the network namespace `/run/netns/<name>` for good.

    :raises OSError: there is no such namespace, or the kernel refused.
    """
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(fd, CLONE_NEWNET, name)
    finally:
        os.close(fd)


def mount(source: Path | str, target: Path | str, kind: str, flags: int, data: str = "") -> None:
    """Mount a file system, or change a mount (mount(2)); an empty `kind` or `data` is a null pointer.

    :raises OSError: the kernel refused.
    """
    words = (os.fsencode(source), os.fsencode(target), kind.encode() or None)
    result = libc.mount(*words, ctypes.c_ulong(flags), data.encode() or None)
    check(result, f"mount {source} at {target}")


def umount(target: Path | str, flags: int = 0) -> None:
    """Remove a mount (umount2(2)).

    :raises OSError: the kernel refused; EINVAL where nothing is mounted there.
    """
    check(libc.umount2(os.fsencode(target), flags), f"umount {target}")


def pivot_root(new_root: str, put_old: str) -> None:
    """Change the root mount of the calling thread's mount namespace (pivot_root(2)).

    :raises OSError: the kernel refused.
    """
    number = _SYS_PIVOT_ROOT[platform.machine()]
    check(libc.syscall(number, os.fsencode(new_root), os.fsencode(put_old)), "pivot_root")


def landlock_abi() -> int:
    """Return the version of the kernel's Landlock ABI (landlock_create_ruleset(2)); -1 without Landlock."""
    return int(libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION))
