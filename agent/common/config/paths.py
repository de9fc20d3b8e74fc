"""Every path that the agent derives from its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent.common.config.settings import Settings


@dataclass(frozen=True, slots=True)
class Paths:
    """Paths of one agent."""

    run_dir: Path
    state_dir: Path

    @classmethod
    def of(cls, settings: Settings) -> Paths:
        """Returns the paths of these settings."""
        return cls(settings.paths.run_dir, settings.paths.state_dir)

    @property
    def lock(self) -> Path:
        """Held by the one agent that owns the state directory."""
        return self.state_dir / "agent.lock"

    @property
    def run_lock(self) -> Path:
        """Held by the one agent that owns the run directory: it removes what it does not know there."""
        return self.run_dir / "agent.lock"

    @property
    def database(self) -> Path:
        """The node's state."""
        return self.state_dir / "state.db"

    @property
    def disk_templates(self) -> Path:
        """Freshly formatted disks, by size."""
        return self.state_dir / "disk-templates"

    @property
    def templates(self) -> Path:
        """Frozen VMs that sandboxes are cloned from."""
        return self.state_dir / "templates"

    @property
    def volumes(self) -> Path:
        """Holds one directory per volume and snapshot."""
        return self.state_dir / "volumes"

    @property
    def secrets(self) -> Path:
        """Values of secrets, encrypted."""
        return self.state_dir / "secrets"

    @property
    def uplink_marker(self) -> Path:
        """There as long as the uplink namespace may have rules of this agent's."""
        return self.run_dir / "uplink"

    @property
    def sandboxes_state(self) -> Path:
        """Holds one directory per sandbox."""
        return self.state_dir / "sandboxes"

    @property
    def sandboxes_run(self) -> Path:
        """Holds one directory per sandbox; short, since sockets are in it."""
        return self.run_dir / "vm"

    @property
    def private_socket(self) -> Path:
        """Where gRPC itself listens, behind the check of peer credentials."""
        return self.run_dir / "private" / "grpc.sock"

    def sandbox_state(self, sandbox_id: str) -> Path:
        """What of a sandbox survives a reboot: its disk."""
        return self.sandboxes_state / sandbox_id

    def sandbox_run(self, sandbox_id: str) -> Path:
        """Sockets and logs of a sandbox."""
        return self.sandboxes_run / sandbox_id

    def disk(self, sandbox_id: str) -> Path:
        """The sandbox's own writable disk."""
        return self.sandbox_state(sandbox_id) / "data.img"

    def memory(self, sandbox_id: str) -> Path:
        """What a suspended sandbox has of its VM: a directory."""
        return self.sandbox_state(sandbox_id) / "memory"

    def forks(self, sandbox_id: str) -> Path:
        """Holds what forks of a sandbox that are under way are made of; nothing in it outlives the agent."""
        return self.sandbox_state(sandbox_id) / "forks"

    def empty_slot(self, sandbox_id: str, number: int) -> Path:
        """What a VM has in a place for a volume that it does not have."""
        return self.sandbox_state(sandbox_id) / f"slot{number}.img"
