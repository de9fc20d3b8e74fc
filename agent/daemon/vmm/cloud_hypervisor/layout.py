"""Paths of one VM's files below its run directory.

The VMM creates files only in directories of its own, which its user may own. An attacker in control of the VMM can put
links there, so the agent writes nothing into them and follows no link out of them. All other files belong to the agent.
"""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent.common.errors import VmmError
from agent.daemon.host.process import Confinement
from agent.daemon.vmm import confinement as vmm_confinement

_MAX_STATE_BYTES = 64 << 20
_STATE_FILES = ("config.json", "state.json")
_RAM_FILE = "memory-ranges"


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths below a VM's `run_dir`."""

    run_dir: Path

    @property
    def api(self) -> Path:
        """Socket of the REST API; the agent binds it and hands it to the VMM."""
        return self.run_dir / "api.sock"

    @property
    def events(self) -> Path:
        """FIFO of the event monitor."""
        return self.run_dir / "events"

    @property
    def log_pipe(self) -> Path:
        """FIFO of the VMM's stderr."""
        return self.run_dir / "log"

    @property
    def log(self) -> Path:
        """Log of the VMM's stderr, of bounded size."""
        return self.run_dir / "vmm.log"

    @property
    def console_pipe(self) -> Path:
        """FIFO of the serial console."""
        return self.run_dir / "console"

    @property
    def console(self) -> Path:
        """Log of the serial console, of bounded size."""
        return self.run_dir / "console.log"

    @property
    def restore(self) -> Path:
        """Directory of config.json and state.json while a VM is restored."""
        return self.run_dir / "restore"

    @property
    def vmm_dir(self) -> Path:
        """Directory that the VMM's user owns."""
        return self.run_dir / "vmm"

    @property
    def snapshot(self) -> Path:
        """Directory for the VMM's snapshot; the VMM's user owns it, too."""
        return self.run_dir / "snapshot"

    @property
    def vsock(self) -> Path:
        """Socket for connections to the guest."""
        return self.vmm_dir / "vsock.sock"

    def create(self, confinement: Confinement) -> None:
        """Create the VMM's directories, empty, and let the VMM's user reach them."""
        self.remove()
        if confinement.uid is not None:
            os.chown(self.run_dir, -1, confinement.gid)
            self.run_dir.chmod(0o710)
        for path in (self.vmm_dir, self.snapshot):
            path.mkdir(mode=0o700)
            _grant(path, confinement)

    def create_restore(self, config: bytes, snapshot: Path, confinement: Confinement) -> None:
        """Fill `restore` with a configuration and the other files of a snapshot.

        :raises VmmError: the snapshot cannot be read (SNAPSHOT_FAILED).
        """
        self.remove_restore()
        self.restore.mkdir(mode=0o700)
        try:
            data = (snapshot / "state.json").read_bytes()
            if (snapshot / _RAM_FILE).exists():
                (self.restore / _RAM_FILE).symlink_to(snapshot / _RAM_FILE)
        except OSError as error:
            raise VmmError(f"the snapshot cannot be read: {error}", reason="SNAPSHOT_FAILED") from error
        for name, content in zip(_STATE_FILES, (config, data), strict=True):
            (self.restore / name).write_bytes(content)
            _grant(self.restore / name, confinement)
        _grant(self.restore, confinement)

    def remove_restore(self) -> None:
        """Remove `restore`. Idempotent."""
        shutil.rmtree(self.restore, ignore_errors=True)

    def copy_snapshot(self, directory: Path) -> None:
        """Copy the files that the VMM wrote into `snapshot` to `directory`.

        :raises VmmError: there are other files than configuration and state, such as the RAM (SNAPSHOT_FAILED).
        """
        found = sorted(entry.name for entry in self.snapshot.iterdir())
        if found != sorted(_STATE_FILES):
            raise VmmError(f"the snapshot consists of {', '.join(found)}", reason="SNAPSHOT_FAILED")
        for name in _STATE_FILES:
            (directory / name).write_bytes(_read_regular(self.snapshot / name))

    def reclaim_saved(self, directory: Path) -> None:
        """Make the agent own the files that the VMM saved into `directory`: configuration, state and RAM.

        :raises VmmError: there are other files (SNAPSHOT_FAILED).
        """
        vmm_confinement.reclaim_directory(directory, (*_STATE_FILES, _RAM_FILE))

    def remove(self) -> None:
        """Remove all files but logs. Idempotent."""
        for path in (self.vmm_dir, self.snapshot, self.restore):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.api, self.events, self.log_pipe, self.console_pipe):
            with suppress(FileNotFoundError):
                path.unlink()


def _grant(path: Path, confinement: Confinement) -> None:
    if confinement.uid is not None:
        os.chown(path, confinement.uid, confinement.gid)


def _read_regular(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise VmmError(f"the snapshot cannot be read: {error}", reason="SNAPSHOT_FAILED") from error
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > _MAX_STATE_BYTES:
            raise VmmError(f"the snapshot's {path.name} is too large or not a regular file", reason="SNAPSHOT_FAILED")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(_MAX_STATE_BYTES)
    finally:
        os.close(fd)
