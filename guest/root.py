"""Mount the guest's file systems: those of the boot, the writable root of a sandbox, and volumes."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time

from guest import kernel
from guest.kernel import MS_MOVE, MS_NOATIME, MS_NODEV, MS_NOEXEC, MS_NOSUID

_SAFE = MS_NOSUID | MS_NODEV | MS_NOEXEC
_OVERLAY = "lowerdir=/,upperdir=/overlay/upper,workdir=/overlay/work"
_BLKFLSBUF = 0x1261
_EXT4_IOC_RESIZE_FS = 0x40086610
_SIZE_TRIES, _SIZE_INTERVAL_S = 1000, 0.002
_MOVED = ("/dev", "/proc", "/sys", "/run", "/tmp")


def mount_boot_file_systems() -> None:
    """Mount /proc, /sys, /dev/pts and so on; the root stays read-only.

    :raises OSError: a mount failed.
    """
    kernel.mount("proc", "/proc", "proc", _SAFE)
    kernel.mount("sysfs", "/sys", "sysfs", _SAFE)
    kernel.mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    kernel.mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    for directory in ("/dev/pts", "/dev/shm"):
        os.makedirs(directory, exist_ok=True)
    kernel.mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666")
    kernel.mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        if not os.path.lexists(f"/dev/{name}"):
            os.symlink(target, f"/dev/{name}")


def find_disk(serial: str) -> str:
    """Return the device of the disk with this serial number.

    :raises FileNotFoundError: no disk has this serial number.
    """
    for name in sorted(os.listdir("/sys/block")):
        try:
            with open(f"/sys/block/{name}/serial") as file:
                if file.read().strip() == serial:
                    return f"/dev/{name}"
        except OSError:
            continue
    raise FileNotFoundError(2, "no disk with this serial number", serial)


def wait_for_size(device: str, size_bytes: int) -> None:
    """Wait until the driver reports this size: in a clone, the disk is not the template's.

    :raises OSError: the driver does not report it within 2 s.
    """
    for _ in range(_SIZE_TRIES):
        if size_of(device) == size_bytes:
            return
        time.sleep(_SIZE_INTERVAL_S)
    raise OSError(errno.ENXIO, "the disk does not have the expected size", device)


def drop_cache(device: str) -> None:
    """Drop cached blocks of a disk (BLKFLSBUF of linux/fs.h): in a clone, the disk is not the template's.

    :raises OSError: the device cannot be opened.
    """
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _BLKFLSBUF)
    finally:
        os.close(fd)


def size_of(device: str) -> int:
    """Return the size of a disk in bytes, as the driver reports it.

    :raises OSError: there is no such disk.
    """
    with open(f"/sys/block/{device.rpartition('/')[2]}/size") as file:
        return int(file.read()) * 512


def grow(mount_point: str, size_bytes: int) -> None:
    """Grow the mounted ext4 file system to the size of its disk, if it is smaller (EXT4_IOC_RESIZE_FS).

    :raises OSError: the kernel refused.
    """
    facts = os.statvfs(mount_point)
    if facts.f_frsize * facts.f_blocks >= size_bytes - size_bytes // 8:  # statvfs does not count ext4's own tables
        return
    fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _EXT4_IOC_RESIZE_FS, struct.pack("Q", size_bytes // facts.f_frsize))
    finally:
        os.close(fd)


def mount_volume(serial: str, path: str, size_bytes: int) -> None:
    """Mount the ext4 file system of the disk with this serial number at `path`.

    :raises OSError: there is no such disk, or it cannot be mounted.
    """
    device = find_disk(serial)
    wait_for_size(device, size_bytes)
    drop_cache(device)
    os.makedirs(path, 0o755, exist_ok=True)
    kernel.mount(device, path, "ext4", MS_NOATIME | MS_NODEV, "discard")
    grow(path, size_bytes)


def warm_up_mounts(device: str) -> None:
    """Mount and unmount a writable root, since the first mount of a kernel is slow.

    :raises OSError: a mount failed.
    """
    _mount_overlay(device)
    try:
        with open("/newroot/etc/hostname", "w") as file:
            file.write("template\n")
    finally:
        kernel.unmount("/newroot")
        kernel.unmount("/overlay")
    drop_cache(device)


def _mount_overlay(device: str) -> None:
    kernel.mount(device, "/overlay", "ext4", MS_NOATIME, "discard")
    try:
        try:
            kernel.mount("overlay", "/newroot", "overlay", MS_NOATIME, _OVERLAY)
        except FileNotFoundError:  # the disk was formatted without the two directories
            for directory in ("/overlay/upper", "/overlay/work"):
                os.makedirs(directory, 0o755, exist_ok=True)
            kernel.mount("overlay", "/newroot", "overlay", MS_NOATIME, _OVERLAY)
    except OSError:
        kernel.unmount("/overlay")
        raise


def mount_writable_root(device: str, grown_bytes: int = 0) -> None:
    """Make `/` an overlay of the read-only root and the ext4 file system on `device`, for PID 1 and its children.

    As in switch_root(8), the overlay is mounted elsewhere, the other mounts are moved into it, it is moved to `/`, and
    PID 1 enters it: a mount cannot be replaced in place.

    :param grown_bytes: size of a disk that may be larger than its file system; 0: do not grow the file system.
    :raises OSError: a mount failed.
    """
    _mount_overlay(device)
    if grown_bytes:
        grow("/overlay", grown_bytes)
    for directory in _MOVED:
        kernel.mount(directory, f"/newroot{directory}", "", MS_MOVE)
    os.chdir("/newroot")
    kernel.mount(".", "/", "", MS_MOVE)
    os.chroot(".")
    os.chdir("/")
