"""Writable disks of VMs: sparse files with an ext4 file system."""

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

MIN_DISK_BYTES = 16 << 20  # the smallest ext4 file system that the guest's overlay fits into
MAX_DISK_BYTES = 16 << 40
_BLOCK_BYTES = 4096
_TEMPLATES_KEPT = 32

# Content of a new disk: the folders of the guest's overlay and the files that every guest writes first. Creating them
# in the guest would cost an emulated guest a tenth of its start.
_FOLDERS = ("upper/etc", "work")
_FILES = tuple(f"upper/etc/{name}" for name in ("hostname", "hosts", "machine-id", "resolv.conf"))
# A sandbox's disk is deleted with it, so it need not survive a crash: no journal, no checksums, only two backup
# superblocks. Unwritten inode tables stay holes, so the default number of inodes costs nothing.
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

    :param template_dir: directory of the templates, created if missing; a few hundred KiB for each size in use.
    """

    def __init__(self, template_dir: Path) -> None:
        self._dir = template_dir
        self._formatting = threading.Lock()

    async def make_disk(self, path: Path, size_bytes: int) -> None:
        """Create an empty disk; takes about 1 ms if a disk of this size was made before.

        Leaves no file if it fails or is cancelled.

        :raises InvalidSpec: the size is out of range or not a multiple of 4096.
        :raises AlreadyExists: `path` exists.
        :raises ResourceExhausted: the host's disk is full.
        :raises HostError: the file cannot be created, or mkfs.ext4 is missing or failed.
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
            # The thread cannot be stopped; wait for its end.
            await asyncio.wait([work])
            if work.exception() is None:
                await asyncio.to_thread(path.unlink, missing_ok=True)
            raise

    def _make(self, path: Path, size_bytes: int) -> None:
        try:
            copy_sparse(self._template(size_bytes), path)
        except FileExistsError as e:
            raise AlreadyExists(f"{path} exists; remove it or choose another path") from e
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
        """Delete the least recently used templates."""
        templates = sorted(self._dir.glob("ext4-*.img"), key=lambda path: path.stat().st_mtime_ns)
        for template in templates[:-_TEMPLATES_KEPT]:
            template.unlink()


def run_mkfs(path: Path) -> None:
    """Format a file as the ext4 disk of a sandbox, of the file's size (mke2fs(8)). Blocks.

    :raises HostError: mkfs.ext4 is missing or failed.
    :raises OSError: ENOSPC if the host's disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="draft-", dir=path.parent) as name:
        _make_content(Path(name))
        _mkfs(path, *_FORMAT, "-d", name)


def format_volume(path: Path, owner: int) -> None:
    """Format a file as a volume: ext4 with a journal, whose root directory belongs to user `owner`. Blocks.

    :raises HostError: mkfs.ext4 is missing or failed.
    :raises OSError: ENOSPC if the host's disk is full.
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
    """Return the error to raise for a disk that cannot be created."""
    if error.errno in NO_SPACE:
        return ResourceExhausted(
            f"the host's disk is full: cannot create {path}; free space or delete sandboxes", reason="DISK_FULL"
        )
    if error.errno == errno.EFBIG:
        return InvalidSpec(f"the host's file system cannot hold a file as large as {path}: ask for a smaller disk")
    return HostError(f"cannot create the disk {path}: {error.strerror}")
