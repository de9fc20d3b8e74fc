"""System calls without a function in Python's standard library: mount(2), umount2(2), reboot(2), random(4) ioctls."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOATIME, MS_MOVE = 1, 2, 4, 8, 1024, 8192
_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207
_POWER_OFF = 0x4321FEDC

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """Mount a file system (mount(2)).

    :raises OSError: the mount failed.
    """
    _check(
        _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()),
        f"mount {target}",
    )


def unmount(target: str) -> None:
    """Unmount a file system (umount2(2)).

    :raises OSError: it is in use or not mounted.
    """
    _check(_libc.umount2(target.encode(), 0), f"umount {target}")


def add_entropy(seed: bytes) -> None:
    """Add `seed` to the kernel's entropy, credited in full, and reseed the random generators of all CPUs.

    :raises OSError: see random(4).
    """
    with open("/dev/urandom", "wb", buffering=0) as device:
        fcntl.ioctl(device, _RNDADDENTROPY, struct.pack("ii", len(seed) * 8, len(seed)) + seed)
        fcntl.ioctl(device, _RNDRESEEDCRNG)


def power_off() -> None:
    """Write cached data to the disks and power off the VM (reboot(2)).

    :raises OSError: the kernel refused.
    """
    os.sync()
    _check(_libc.reboot(ctypes.c_int(_POWER_OFF)), "reboot")
