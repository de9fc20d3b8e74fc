"""Where the files of one VM lie.

What the VMM makes is in a directory of its own, which it may own: whoever takes over the VMM can put links there, so
the agent writes nothing into it and follows nothing out of it. All else belongs to the agent.
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
        """The socket of the REST API; the agent listens there and hands it to the VMM."""
        return self.run_dir / "api.sock"

    @property
    def events(self) -> Path:
        """A FIFO for the event monitor."""
        return self.run_dir / "events"

    @property
    def log_pipe(self) -> Path:
        """A FIFO for what the VMM prints."""
        return self.run_dir / "log"

    @property
    def log(self) -> Path:
        """What the VMM printed, bounded."""
        return self.run_dir / "vmm.log"

    @property
    def console_pipe(self) -> Path:
        """A FIFO for the serial console."""
        return self.run_dir / "console"

    @property
    def console(self) -> Path:
        """What the guest wrote to its serial console, bounded."""
        return self.run_dir / "console.log"

    @property
    def restore(self) -> Path:
        """Holds config.json and state.json while a clone starts."""
        return self.run_dir / "restore"

    @property
    def own(self) -> Path:
        """The VMM's own directory."""
        return self.run_dir / "vmm"

    @property
    def snapshot(self) -> Path:
        """Where the VMM writes its state; its own, too."""
        return self.run_dir / "snapshot"

    @property
    def vsock(self) -> Path:
        """The socket for connections to the guest."""
        return self.own / "vsock.sock"

    def make(self, confinement: Confinement) -> None:
        """Makes the VMM's own directories, and lets the VMM reach them."""
        self.remove()
        if confinement.uid is not None:
            os.chown(self.run_dir, -1, confinement.gid)
            self.run_dir.chmod(0o710)
        for path in (self.own, self.snapshot):
            path.mkdir(mode=0o700)
            _give(path, confinement)

    def make_restore(self, config: bytes, snapshot: Path, confinement: Confinement) -> None:
        """Fills `restore` with a configuration and the rest of a snapshot. :raises VmmError: that cannot be read."""
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
            _give(self.restore / name, confinement)
        _give(self.restore, confinement)

    def remove_restore(self) -> None:
        """Removes `restore`. Idempotent."""
        shutil.rmtree(self.restore, ignore_errors=True)

    def take_snapshot(self, directory: Path) -> None:
        """Copies what the VMM wrote into `snapshot` to `directory`.

        :raises VmmError: anything but configuration and state is there, such as the RAM.
        """
        found = sorted(entry.name for entry in self.snapshot.iterdir())
        if found != sorted(_STATE_FILES):
            raise VmmError(f"the snapshot consists of {', '.join(found)}", reason="SNAPSHOT_FAILED")
        for name in _STATE_FILES:
            (directory / name).write_bytes(_read_regular(self.snapshot / name))

    def take_save(self, directory: Path) -> None:
        """Makes the agent own what the VMM wrote into `directory`, its RAM as well.

        :raises VmmError: something else is there.
        """
        vmm_confinement.take_directory(directory, (*_STATE_FILES, _RAM_FILE))

    def remove(self) -> None:
        """Removes all but logs. Idempotent."""
        for path in (self.own, self.snapshot, self.restore):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.api, self.events, self.log_pipe, self.console_pipe):
            with suppress(FileNotFoundError):
                path.unlink()


def _give(path: Path, confinement: Confinement) -> None:
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
            raise VmmError(f"the snapshot's {path.name} is not what it must be", reason="SNAPSHOT_FAILED")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(_MAX_STATE_BYTES)
    finally:
        os.close(fd)
