"""System calls without a function in Python's standard library: mounts, inotify(7), reboot(2), random(4) ioctls."""

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


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """Mount a file system (mount(2)).

    :raises OSError: the mount failed.
    """
    _checked(
        _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()),
        f"mount {target}",
    )


def unmount(target: str) -> None:
    """Unmount a file system (umount2(2)).

    :raises OSError: it is in use or not mounted.
    """
    _checked(_libc.umount2(target.encode(), 0), f"umount {target}")


def add_entropy(seed: bytes) -> None:
    """Add `seed` to the kernel's entropy, credited in full, and reseed the random generators of all CPUs.

    :raises OSError: see random(4).
    """
    with open("/dev/urandom", "wb", buffering=0) as device:
        fcntl.ioctl(device, _RNDADDENTROPY, struct.pack("ii", len(seed) * 8, len(seed)) + seed)
        fcntl.ioctl(device, _RNDRESEEDCRNG)


def inotify_init(what: str) -> int:
    """Return a new inotify descriptor that does not block (inotify_init1(2)).

    :param what: path that an error names.
    :raises OSError: the user has too many, or no descriptor is free.
    """
    return _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), what)


def inotify_add_watch(fd: int, path: str, mask: int) -> int:
    """Watch a path and return its watch descriptor (inotify_add_watch(2)).

    :raises OSError: the path cannot be watched.
    """
    return _checked(_libc.inotify_add_watch(fd, os.fsencode(path), mask), path)


def inotify_rm_watch(fd: int, watch: int) -> None:
    """End a watch; a failure is ignored, since the kernel ends the watch of a removed path itself."""
    _libc.inotify_rm_watch(fd, watch)


def power_off() -> None:
    """Write cached data to the disks and power off the VM (reboot(2)).

    :raises OSError: the kernel refused.
    """
    os.sync()
    _checked(_libc.reboot(ctypes.c_int(_POWER_OFF)), "reboot")
