"""Kernel step of a build: extract an ELF kernel from Debian's package, and make its initramfs."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rootfs import digest, initramfs, vmlinux
from rootfs.apt import Apt
from rootfs.command import run
from rootfs.errors import BuildError
from rootfs.modules import ModuleTree
from rootfs.progress import step
from rootfs.store import DRAFT_PREFIX

_META_PACKAGE = "linux-image-cloud-amd64"
_AR_MAGIC = b"!<arch>\n"


@dataclass(frozen=True, slots=True)
class KernelSource:
    """Name and versions of the packages of kernel and busybox, as the mirror has them now."""

    package: str
    version: str
    busybox_version: str


@dataclass(frozen=True, slots=True)
class KernelFiles:
    """Kernel and initramfs in the cache; `epoch` is the build time of the package, in seconds since 1970."""

    vmlinux: Path
    initramfs: Path
    release: str
    epoch: int


def resolve(apt: Apt) -> KernelSource:
    """Return the packages of the suite's present kernel.

    :raises BuildError: the suite has no such kernel.
    """
    found = apt.candidates(_META_PACKAGE, "busybox-static")
    depends = found[_META_PACKAGE]["Depends"]
    match = re.fullmatch(r"(linux-image-\S+) \(= (\S+)\)", depends)
    if match is None:
        raise BuildError(f"{_META_PACKAGE} should depend on exactly one kernel package, not on {depends!r}")
    return KernelSource(match[1], match[2], found["busybox-static"]["Version"])


def prepare(source: KernelSource, apt: Apt, cache: Path) -> KernelFiles:
    """Return kernel and initramfs from `cache`, or make them.

    :raises BuildError: the packages cannot be downloaded, or have an unexpected layout.
    """
    package = apt.download(source.package, source.version)
    busybox = apt.download("busybox-static", source.busybox_version)
    code = sorted(Path(__file__).parent.glob("*.py")) + sorted(Path(__file__).parent.glob("*.sh"))
    key = digest.of_value(
        [digest.of_file(package), digest.of_file(busybox), digest.of_files(Path(__file__).parent, code)]
    )
    final = cache / f"kernel-{key[:16]}"
    release = source.package.removeprefix("linux-image-")
    if not final.exists():
        with step(f"kernel {release}: extracting it and building its initramfs"):
            _make(package, busybox, final, cache)
    return KernelFiles(final / "vmlinux", final / "initramfs", release, build_time(package))


def build_time(package: Path) -> int:
    """Return the build time of a .deb in seconds since 1970: the time stamp of its first member (deb(5)).

    :raises BuildError: the file is not a .deb.
    """
    with package.open("rb") as file:
        head = file.read(len(_AR_MAGIC) + 60)
    try:
        if not head.startswith(_AR_MAGIC):
            raise ValueError
        return int(head[len(_AR_MAGIC) + 16 : len(_AR_MAGIC) + 28])
    except ValueError as e:
        raise BuildError(f"{package} is not a Debian package; remove it and build again") from e


def _make(package: Path, busybox: Path, final: Path, cache: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=DRAFT_PREFIX, dir=cache) as folder:
        tree, draft = Path(folder) / "tree", Path(folder) / "draft"
        draft.mkdir()
        run(["dpkg-deb", "--extract", package, tree])
        run(["dpkg-deb", "--extract", busybox, tree])
        (draft / "vmlinux").write_bytes(vmlinux.extract(_one(tree, "boot/vmlinuz-*").read_bytes()))
        modules = ModuleTree(_one(tree, "lib/modules/*", "usr/lib/modules/*"))
        program = _one(tree, "bin/busybox", "usr/bin/busybox").read_bytes()
        (draft / "initramfs").write_bytes(initramfs.build(program, modules))
        draft.replace(final)
    _remove_older(final)


def _one(tree: Path, *patterns: str) -> Path:
    found = [path for pattern in patterns for path in tree.glob(pattern)]
    if len(found) != 1:
        raise BuildError(f"expected one file {' or '.join(patterns)} in the kernel's packages, found {len(found)}")
    return found[0]


def _remove_older(kept: Path) -> None:
    for path in kept.parent.glob("kernel-*"):
        if path != kept:
            shutil.rmtree(path)
