"""The disks that VMs write on: sparse files with an ext4 file system of their own."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from agent.common.atomic_file import replacement
from agent.common.errors import AgentError, AlreadyExists, HostError, InvalidSpec, ResourceExhausted
from agent.daemon.host.sparse_copy import NO_SPACE, copy_sparse

MIN_DISK_BYTES = 16 << 20
MAX_DISK_BYTES = 16 << 40
_BLOCK_BYTES = 4096
_TEMPLATES_KEPT = 32

# A sandbox's disk is thrown away with it, so nothing is spent on surviving a crash: no journal, no checksums, no backup
# superblocks but two. Unwritten inode tables stay holes, so the default number of inodes costs nothing.
# What is on a new disk: the folders of the guest's overlay, and the files that every guest writes first. Making them
# there would cost an emulated guest a tenth of its start.
_FOLDERS = ("upper/etc", "work")
_FILES = tuple(f"upper/etc/{name}" for name in ("hostname", "hosts", "machine-id", "resolv.conf"))
_FORMAT = (
    "-O", "^has_journal,^resize_inode,^metadata_csum,uninit_bg,sparse_super2",
    "-E", "root_owner=0:0",
    "-m", "0",
    "-b", str(_BLOCK_BYTES),
    "-i", "16384",
    "-L", "sandboxd",
    "-U", "5b3f1d0c-7c0e-4d52-8f5e-73616e646278",
)  # fmt: skip


class DiskMaker:
    """Makes writable disks: sparse files with an empty ext4 file system, copied from a template of the same size.

    :param template_dir: where the templates are kept; created if missing. A few hundred KiB per size in use.
    """

    def __init__(self, template_dir: Path) -> None:
        self._dir = template_dir
        self._formatting = threading.Lock()

    async def make_disk(self, path: Path, size_bytes: int) -> None:
        """Ensures that `path` is a new, empty disk; takes about a millisecond once a disk of this size was made.

        Cancelled or failed, it leaves no file.

        :raises InvalidSpec: a size that no disk can have.
        :raises AlreadyExists: `path` exists.
        :raises ResourceExhausted: the host's disk is full.
        :raises HostError: the file cannot be made, or mkfs.ext4 is missing or failed.
        """
        if not MIN_DISK_BYTES <= size_bytes <= MAX_DISK_BYTES or size_bytes % _BLOCK_BYTES:
            raise InvalidSpec(
                f"a disk cannot have {size_bytes} bytes: use a multiple of {_BLOCK_BYTES} "
                f"from {MIN_DISK_BYTES} to {MAX_DISK_BYTES}",
                reason="INVALID_DISK_SIZE",
            )
        work = asyncio.ensure_future(asyncio.to_thread(self._make, path, size_bytes))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            # The thread cannot be stopped, only waited for.
            await asyncio.wait([work])
            if work.exception() is None:
                await asyncio.to_thread(path.unlink, missing_ok=True)
            raise

    def _make(self, path: Path, size_bytes: int) -> None:
        try:
            copy_sparse(self._template(size_bytes), path)
        except FileExistsError as e:
            raise AlreadyExists(f"{path} exists already; remove it or choose another path") from e
        except OSError as e:
            raise disk_error(path, e) from e

    def _template(self, size_bytes: int) -> Path:
        variant = hashlib.sha256(" ".join((*_FORMAT, *_FOLDERS, *_FILES)).encode()).hexdigest()[:8]
        template = self._dir / f"ext4-{variant}-{size_bytes}.img"
        with self._formatting:
            try:
                os.utime(template)
            except FileNotFoundError:
                self._dir.mkdir(parents=True, exist_ok=True)
                self._format(template, size_bytes)
                self._prune()
        return template

    def _format(self, template: Path, size_bytes: int) -> None:
        with replacement(template, mode=0o600, durable=False) as draft:
            draft.file.truncate(size_bytes)
            run_mkfs(draft.path)

    def _prune(self) -> None:
        """Removes the templates of sizes that were not asked for in the longest time."""
        templates = sorted(self._dir.glob("ext4-*.img"), key=lambda path: path.stat().st_mtime_ns)
        for template in templates[:-_TEMPLATES_KEPT]:
            template.unlink()


def run_mkfs(path: Path) -> None:
    """Ensures that the file holds a new ext4 file system of the file's own size (mke2fs(8)).

    :raises HostError: mkfs.ext4 is missing or failed.
    :raises OSError: ENOSPC where the host's disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="draft-", dir=path.parent) as name:
        _make_content(Path(name))
        _mkfs(path, *_FORMAT, "-d", name)


def format_volume(path: Path, owner: int) -> None:
    """Ensures that the file holds a new ext4 file system that survives crashes, whose root belongs to `owner`.

    :raises HostError: mkfs.ext4 is missing or failed. :raises OSError: ENOSPC where the host's disk is full.
    """
    _mkfs(path, "-m", "0", "-b", str(_BLOCK_BYTES), "-E", f"root_owner={owner}:{owner}", "-L", "volume")


def _mkfs(path: Path, *options: str) -> None:
    program = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise HostError("mkfs.ext4 is missing: apt-get install e2fsprogs", reason="PROGRAM_MISSING")
    done = subprocess.run([program, "-q", "-F", *options, str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if os.strerror(errno.ENOSPC) in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise HostError(f"mkfs.ext4 failed with status {done.returncode}: {done.stderr.strip()[-500:]}")


def _make_content(directory: Path) -> None:
    directory.chmod(0o755)
    for folder in _FOLDERS:
        (directory / folder).mkdir(parents=True)
    for path in (directory / "upper", *(directory / folder for folder in _FOLDERS)):
        path.chmod(0o755)
    for file in _FILES:
        (directory / file).touch()
        (directory / file).chmod(0o644)


def disk_error(path: Path, error: OSError) -> AgentError:
    """Returns the error for a disk that cannot be made."""
    if error.errno in NO_SPACE:
        return ResourceExhausted(
            f"the host's disk is full: cannot make {path}; free space or delete sandboxes", reason="DISK_FULL"
        )
    if error.errno == errno.EFBIG:
        return InvalidSpec(f"the host's file system cannot hold a file as large as {path}: ask for a smaller disk")
    return HostError(f"cannot make the disk {path}: {error.strerror}")
