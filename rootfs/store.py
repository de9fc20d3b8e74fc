"""Store finished images: a directory per input digest, and a symbolic link per name.

    <images_dir>/minimal -> .store/minimal-0123456789ab
    <images_dir>/.store/minimal-0123456789ab/{manifest.json,vmlinux,initramfs,root.erofs}

Links are replaced by rename(2): a reader of <images_dir>/<name> sees a complete image, the old or the new one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rootfs.errors import BuildError
from rootfs.progress import say

MANIFEST = "manifest.json"
DRAFT_PREFIX = "tmp-"
_DIGEST_LENGTH = 12


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` (created if missing) against other builders, waiting for one that is running.

    Removes the drafts of builders that were killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another build that uses {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in folder.glob(f"{DRAFT_PREFIX}*"):
            shutil.rmtree(stale)
        yield


class Store:
    """The images below a directory. Callers must hold `locked(store.folder)`."""

    def __init__(self, images_dir: Path) -> None:
        self.images_dir = images_dir
        self.folder = images_dir / ".store"

    def find(self, name: str, input_digest: str) -> Path | None:
        """Return the directory of the image with this input digest, or None if it is missing or incomplete."""
        entry = self._entry(name, input_digest)
        manifest = read_manifest(entry)
        return entry if manifest is not None and manifest.get("input_digest") == input_digest else None

    def current(self, name: str) -> Path | None:
        """Return the directory of the published image `name`, or None."""
        entry = (self.images_dir / name).resolve()
        return entry if read_manifest(entry) is not None else None

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """Yield an empty directory for a new image; remove at the end what `publish` has not moved."""
        with tempfile.TemporaryDirectory(prefix=DRAFT_PREFIX, dir=self.folder, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def publish(self, name: str, image: Path, input_digest: str) -> Path:
        """Publish an image, moved from a draft if it is in one, under `name`; return its directory.

        :raises BuildError: the path of the name is not a link to an image.
        """
        link = self.images_dir / name
        if link.exists() and not link.is_symlink():
            raise BuildError(f"{link} is in the way: not a link to an image; move it away and build again")
        entry = self._entry(name, input_digest)
        if image != entry:
            _settle(image)
            if entry.exists():
                shutil.rmtree(entry)
            image.rename(entry)
        before = self.current(name)
        if before == entry:
            return entry
        draft = self.folder / f".{name}.link"
        draft.unlink(missing_ok=True)
        draft.symlink_to(entry.relative_to(self.images_dir))
        draft.replace(link)
        self._prune(name, keep={entry, before})
        return entry

    def _prune(self, name: str, keep: set[Path | None]) -> None:
        """Remove earlier images of a name except those in `keep`.

        The previous image is kept, as virtual machines may be starting from it; VMMs that run from older images have
        their files open.
        """
        for entry in self.folder.glob(f"{name}-{'[0-9a-f]' * _DIGEST_LENGTH}"):
            if entry not in keep:
                shutil.rmtree(entry)

    def _entry(self, name: str, input_digest: str) -> Path:
        return self.folder.resolve() / f"{name}-{input_digest[:_DIGEST_LENGTH]}"


def read_manifest(image: Path) -> dict[str, object] | None:
    """Return an image's manifest, or None if the image is missing or incomplete."""
    try:
        manifest = json.loads((image / MANIFEST).read_text())
        for part in ("kernel", "initramfs", "root"):
            if (image / manifest[part]["file"]).stat().st_size != manifest[part]["size_bytes"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _settle(folder: Path) -> None:
    """Flush a directory and its files to the disk, so that a published image survives a power failure."""
    folder.chmod(0o755)
    for path in (*folder.iterdir(), folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
