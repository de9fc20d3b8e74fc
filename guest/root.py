"""The file systems of the guest: what PID 1 mounts at boot, and the writable root that a sandbox gets when it is
configured.
"""

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
    """Mounts what every program expects; the root stays read-only. :raises OSError:"""
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
    """Returns the device of the disk with this serial number. :raises FileNotFoundError:"""
    for name in sorted(os.listdir("/sys/block")):
        try:
            with open(f"/sys/block/{name}/serial") as file:
                if file.read().strip() == serial:
                    return f"/dev/{name}"
        except OSError:
            continue
    raise FileNotFoundError(2, "no disk with this serial number", serial)


def await_size(device: str, size_bytes: int) -> None:
    """Waits for the driver to know that the disk has another size than when the guest was frozen. :raises OSError:"""
    for _ in range(_SIZE_TRIES):
        if size_of(device) == size_bytes:
            return
        time.sleep(_SIZE_INTERVAL_S)
    raise OSError(errno.ENXIO, "the disk does not have the size that was announced", device)


def drop_cache(device: str) -> None:
    """Forgets what was read of the disk: in a clone it is another one (BLKFLSBUF of linux/fs.h). :raises OSError:"""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _BLKFLSBUF)
    finally:
        os.close(fd)


def size_of(device: str) -> int:
    """Returns how many bytes the driver says that the disk has. :raises OSError:"""
    with open(f"/sys/block/{device.rpartition('/')[2]}/size") as file:
        return int(file.read()) * 512


def grow(mount_point: str, size_bytes: int) -> None:
    """Makes the ext4 file system there as large as its disk, if it is smaller (EXT4_IOC_RESIZE_FS). :raises OSError:"""
    facts = os.statvfs(mount_point)
    if facts.f_frsize * facts.f_blocks >= size_bytes - size_bytes // 8:  # its own tables are not counted
        return
    fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _EXT4_IOC_RESIZE_FS, struct.pack("Q", size_bytes // facts.f_frsize))
    finally:
        os.close(fd)


def mount_volume(serial: str, path: str, size_bytes: int) -> None:
    """Mounts the ext4 file system of the disk with this serial number. :raises OSError:"""
    device = find_disk(serial)
    await_size(device, size_bytes)
    drop_cache(device)
    os.makedirs(path, 0o755, exist_ok=True)
    kernel.mount(device, path, "ext4", MS_NOATIME | MS_NODEV, "discard")
    grow(path, size_bytes)


def rehearse(device: str) -> None:
    """Mounts a writable root aside and unmounts it, so that the kernel has done for the first time what is slow then.

    :raises OSError:
    """
    _mount_aside(device)
    try:
        with open("/newroot/etc/hostname", "w") as file:
            file.write("rehearsal\n")
    finally:
        kernel.unmount("/newroot")
        kernel.unmount("/overlay")
    drop_cache(device)


def _mount_aside(device: str) -> None:
    kernel.mount(device, "/overlay", "ext4", MS_NOATIME, "discard")
    try:
        try:
            kernel.mount("overlay", "/newroot", "overlay", MS_NOATIME, _OVERLAY)
        except FileNotFoundError:  # a disk that did not come with the two folders
            for directory in ("/overlay/upper", "/overlay/work"):
                os.makedirs(directory, 0o755, exist_ok=True)
            kernel.mount("overlay", "/newroot", "overlay", MS_NOATIME, _OVERLAY)
    except OSError:
        kernel.unmount("/overlay")
        raise


def mount_writable_root(device: str, grown_bytes: int = 0) -> None:
    """Makes `/` an overlay of the read-only root and the ext4 file system on `device`, for PID 1 and all that it
    starts.

    Mounts cannot be replaced in place: the overlay is mounted aside, the other file systems move into it, it moves to
    `/`, and PID 1 enters it (as switch_root(8) does). :raises OSError:

    :param grown_bytes: of a disk that may be larger than its file system; else 0.
    """
    _mount_aside(device)
    if grown_bytes:
        grow("/overlay", grown_bytes)
    for directory in _MOVED:
        kernel.mount(directory, f"/newroot{directory}", "", MS_MOVE)
    os.chdir("/newroot")
    kernel.mount(".", "/", "", MS_MOVE)
    os.chroot(".")
    os.chdir("/")
