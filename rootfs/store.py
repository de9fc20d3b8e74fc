"""Where finished images are kept: content-addressed directories, and one symbolic link per name.

    <images_dir>/minimal -> .store/minimal-0123456789ab
    <images_dir>/.store/minimal-0123456789ab/{manifest.json,vmlinux,initramfs,root.erofs}

A reader that opens <images_dir>/<name> sees a whole image, old or new: links are swapped by rename(2).
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
    """Makes this builder the only one at work in `folder` (created if missing); waits for another one to end.

    Drafts of builders that were killed are removed.
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
    """The images below one directory; use it while `locked(store.folder)`."""

    def __init__(self, images_dir: Path) -> None:
        self.images_dir = images_dir
        self.folder = images_dir / ".store"

    def find(self, name: str, input_digest: str) -> Path | None:
        """Returns the image made from exactly these inputs, if it is whole."""
        entry = self._entry(name, input_digest)
        manifest = read_manifest(entry)
        return entry if manifest is not None and manifest.get("input_digest") == input_digest else None

    def current(self, name: str) -> Path | None:
        """Returns the image that a name leads to now."""
        entry = (self.images_dir / name).resolve()
        return entry if read_manifest(entry) is not None else None

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """Gives an empty directory for a new image; removed at the end unless `publish` moved it away."""
        with tempfile.TemporaryDirectory(prefix=DRAFT_PREFIX, dir=self.folder, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def publish(self, name: str, image: Path, input_digest: str) -> Path:
        """Makes `name` lead to the image, moved from a draft if need be. Returns its directory.

        :raises BuildError: the name is taken by something else.
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
        """Removes the images that a name led to earlier, but for those in `keep`.

        The one before stays, because virtual machines may have been started from it; of older ones, a VMM that still
        runs holds the files open.
        """
        for entry in self.folder.glob(f"{name}-{'[0-9a-f]' * _DIGEST_LENGTH}"):
            if entry not in keep:
                shutil.rmtree(entry)

    def _entry(self, name: str, input_digest: str) -> Path:
        return self.folder.resolve() / f"{name}-{input_digest[:_DIGEST_LENGTH]}"


def read_manifest(image: Path) -> dict[str, object] | None:
    """Returns an image's manifest, or None if there is no image or it lacks a file."""
    try:
        manifest = json.loads((image / MANIFEST).read_text())
        for part in ("kernel", "initramfs", "root"):
            if (image / manifest[part]["file"]).stat().st_size != manifest[part]["size_bytes"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _settle(folder: Path) -> None:
    """Writes a directory's files to the disk, so that a published image survives a power cut whole."""
    folder.chmod(0o755)
    for path in (*folder.iterdir(), folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
