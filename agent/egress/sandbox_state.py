"""State of a sandbox in the egress process: policy, secrets, pinned DNS answers and open connections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from agent.common.ca import LocalCa
from agent.common.policy.policy import Policy
from agent.common.policy.reasons import Reason
from agent.common.policy.secret import Secret
from agent.egress.dns_pins import DnsPins
from agent.egress.report import Reporter


class OpenConnection(Protocol):
    """Open connection of a sandbox, ended when a new policy forbids it."""

    def recheck(self) -> Reason | None:
        """Return why the current policy forbids the connection, or None if it is allowed."""

    def abort(self) -> None:
        """Reset both sides of the connection. Idempotent."""


class Denied(Exception):
    """The policy forbids a connection or request. `host` is its destination, in the guest's words."""

    def __init__(self, reason: Reason, host: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.host = host


@dataclass(eq=False, slots=True)
class SandboxState:
    """One sandbox. Updates replace `policy` and `secrets`: read them anew for each decision."""

    id: str
    policy: Policy
    reporter: Reporter
    secrets: tuple[Secret, ...] = ()
    ca: LocalCa | None = None
    pins: DnsPins = field(default_factory=DnsPins)
    connections: set[OpenConnection] = field(default_factory=set)

    def deny(self, reason: Reason, host: str, port: int, protocol: str) -> None:
        """Count a denial. `protocol` is dns, tls, http or tcp."""
        self.reporter.deny(self.id, reason, host, port, protocol)

    def secrets_for(self, name: str, port: int) -> tuple[Secret, ...]:
        """Return the secrets whose values may be sent to this (normalised) name."""
        return tuple(secret for secret in self.secrets if secret.is_for(name, port))

    def update(self, policy: Policy, secrets: tuple[Secret, ...], ca: LocalCa | None) -> int:
        """Replace policy, secrets and CA; reset connections that are no longer allowed and return their number."""
        self.policy, self.secrets, self.ca = policy, secrets, ca
        ended = 0
        for connection in list(self.connections):
            if connection.recheck() is not None:
                connection.abort()
                self.deny(Reason.POLICY_CHANGED, "", 0, "tcp")
                ended += 1
        return ended

    def close(self) -> None:
        """Reset all connections."""
        for connection in list(self.connections):
            connection.abort()
        self.connections.clear()
