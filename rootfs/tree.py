"""Make the guest's root tree from unpacked packages: user, configuration, guest code."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rootfs.command import run, run_isolated
from rootfs.flavours import COMPILE

USER_ID = 1000
_HOME = "home/sandbox"
_GUEST = "usr/lib/sandboxd"

# Files of package scripts that differ between builds, come from the build machine, or are not needed.
_LEFTOVERS = (
    "boot/*",
    "dev/*",
    "etc/apt/apt.conf.d/99mmdebstrap",
    "etc/machine-id",
    "etc/ssh/ssh_host_*",
    "run/*",
    "tmp/*",
    "var/cache/apt/*",
    "var/cache/debconf/*",
    "var/cache/ldconfig/*",
    "var/cache/man/*",
    "var/lib/apt/lists/*",
    "var/lib/dpkg/*-old",
    "var/lib/dpkg/lock*",
    "var/lib/systemd",
    "var/log/*",
    "var/tmp/*",
)
_MOUNT_POINTS = ("dev", "mnt", "newroot", "overlay", "proc", "run", "sys", "tmp")

_FILES = {
    "etc/hostname": "sandbox\n",
    "etc/hosts": "127.0.0.1\tlocalhost sandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    # No name server before the configuration: look-ups fail at once instead of timing out.
    "etc/resolv.conf": "",
    "etc/fstab": "",
    "etc/motd": "",
    "etc/sudoers.d/sandbox": "sandbox ALL=(ALL:ALL) NOPASSWD: ALL\n",
    f"{_GUEST}/run.py": (
        "import sys\n\n"
        'sys.path.insert(0, "/usr/lib/sandboxd")\n\n'
        "from guest.init import main\n\n"
        "main()\n"
    ),
    f"{_HOME}/.bashrc": (
        "# Read by interactive shells.\n"
        "[[ $- == *i* ]] || return\n"
        "PS1='\\u@\\h:\\w\\$ '\n"
        "HISTCONTROL=ignoreboth\n"
        "alias ls='ls --color=auto'\n"
    ),
    f"{_HOME}/.profile": '[ -n "$BASH_VERSION" ] && . "$HOME/.bashrc"\n',
}  # fmt: skip


def unpack(tarball: Path, tree: Path) -> None:
    """Unpack the package step's tarball with owners, modes and extended attributes.

    :raises BuildError: tar failed: no root rights, or the disk is full.
    """
    tree.mkdir()
    run(["tar", "--extract", "--file", tarball, "--directory", tree, "--numeric-owner", "--same-permissions",
         "--xattrs", "--xattrs-include=*"])  # fmt: skip


def finish(tree: Path, guest_files: dict[str, Path]) -> None:
    """Add user, configuration and guest code to unpacked packages, and remove traces of the build.

    :param guest_files: path in the guest package -> source file.
    :raises BuildError: the guest's code does not compile under the image's Python.
    """
    clean(tree)
    add_user(tree)
    for path, text in _FILES.items():
        _write(tree / path, text)
    (tree / "etc/sudoers.d/sandbox").chmod(0o440)
    for path, source in guest_files.items():
        _write(tree / _GUEST / "guest" / path, source.read_text())
    _own_home(tree)
    run_isolated(["chroot", tree, "/usr/bin/env", "-i", "PYTHONHASHSEED=0", "/usr/bin/python3", "-S",
                  *COMPILE.split(), f"/{_GUEST}"])  # fmt: skip


def clean(tree: Path) -> None:
    """Remove _LEFTOVERS, and make the empty mount points."""
    for pattern in _LEFTOVERS:
        for path in tree.glob(pattern):
            _remove(path)
    for name in _MOUNT_POINTS:
        (tree / name).mkdir(exist_ok=True)
    (tree / "tmp").chmod(0o1777)


def add_user(tree: Path) -> None:
    """Add user and group `sandbox`, without a password; the home is /home/sandbox, with the link /home/app."""
    _append(tree / "etc/passwd", f"sandbox:x:{USER_ID}:{USER_ID}:sandbox:/{_HOME}:/bin/bash")
    _append(tree / "etc/group", f"sandbox:x:{USER_ID}:")
    _append(tree / "etc/shadow", "sandbox:*:20000:0:99999:7:::")
    _append(tree / "etc/gshadow", "sandbox:!::")
    for name in ("shadow", "gshadow"):  # not world-readable, also where no package has created them
        (tree / "etc" / name).chmod(0o640)
    (tree / _HOME).mkdir(parents=True)
    (tree / "home/app").symlink_to("sandbox")
    # The Deno SDKs' examples put programs there.
    (tree / "app").mkdir()
    os.chown(tree / "app", USER_ID, USER_ID)


def _own_home(tree: Path) -> None:
    home = tree / _HOME
    for path in (home, *home.rglob("*")):
        os.chown(path, USER_ID, USER_ID, follow_symlinks=False)
    home.chmod(0o755)


def _append(path: Path, line: str) -> None:
    text = path.read_text() if path.exists() else ""
    path.write_text(f"{text}{line}\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(path)
    path.write_text(text)
    path.chmod(0o644)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
