"""Paths of the daemon's files, derived from its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent.common.config.settings import Settings


@dataclass(frozen=True, slots=True)
class Paths:
    """Paths of one daemon's files."""

    run_dir: Path
    state_dir: Path

    @classmethod
    def of(cls, settings: Settings) -> Paths:
        """Return the paths for `settings`."""
        return cls(settings.paths.run_dir, settings.paths.state_dir)

    @property
    def lock(self) -> Path:
        """Lock of the state directory: one daemon at a time."""
        return self.state_dir / "agent.lock"

    @property
    def run_lock(self) -> Path:
        """Lock of the run directory: one daemon at a time, since it removes unknown files there."""
        return self.run_dir / "agent.lock"

    @property
    def database(self) -> Path:
        """SQLite database of the sandboxes' records."""
        return self.state_dir / "state.db"

    @property
    def disk_templates(self) -> Path:
        """Directory of formatted empty disks, one per size."""
        return self.state_dir / "disk-templates"

    @property
    def templates(self) -> Path:
        """Directory of templates: snapshots of booted VMs from which sandboxes are cloned."""
        return self.state_dir / "templates"

    @property
    def volumes(self) -> Path:
        """Directory with one directory per volume and snapshot."""
        return self.state_dir / "volumes"

    @property
    def secrets(self) -> Path:
        """Directory of the encrypted values of secrets."""
        return self.state_dir / "secrets"

    @property
    def uplink_marker(self) -> Path:
        """Marker file: exists while the uplink namespace may have nftables rules of this daemon."""
        return self.run_dir / "uplink"

    @property
    def sandboxes_state(self) -> Path:
        """Directory with the persistent directory of each sandbox."""
        return self.state_dir / "sandboxes"

    @property
    def sandboxes_run(self) -> Path:
        """Directory with the run directory of each sandbox. The path is short: unix sockets lie below it."""
        return self.run_dir / "vm"

    @property
    def private_socket(self) -> Path:
        """Socket of gRPC itself, behind the check of credentials (agent/daemon/rpc/auth/peercred.py)."""
        return self.run_dir / "private" / "grpc.sock"

    def sandbox_state(self, sandbox_id: str) -> Path:
        """Directory of a sandbox that survives a reboot: its disk and its suspended memory."""
        return self.sandboxes_state / sandbox_id

    def sandbox_run(self, sandbox_id: str) -> Path:
        """Directory of a sandbox's sockets and logs."""
        return self.sandboxes_run / sandbox_id

    def disk(self, sandbox_id: str) -> Path:
        """Writable disk of a sandbox."""
        return self.sandbox_state(sandbox_id) / "data.img"

    def memory(self, sandbox_id: str) -> Path:
        """Directory with the VM snapshot of a suspended sandbox."""
        return self.sandbox_state(sandbox_id) / "memory"

    def forks(self, sandbox_id: str) -> Path:
        """Directory with the snapshots for forks in progress; emptied when the daemon starts."""
        return self.sandbox_state(sandbox_id) / "forks"

    def empty_slot(self, sandbox_id: str, number: int) -> Path:
        """Empty disk image in a VM's slot for a volume that the sandbox does not have."""
        return self.sandbox_state(sandbox_id) / f"slot{number}.img"
