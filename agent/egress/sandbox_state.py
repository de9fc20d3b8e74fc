"""A sandbox as the egress process knows it: policy, secrets, what its names were answered with, what it has open."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from agent.common.ca import LocalCa
from agent.common.policy.policy import Policy
from agent.common.policy.reasons import Reason
from agent.common.policy.secret import Secret
from agent.egress.dns_pins import DnsPins
from agent.egress.report import Reporter


class Connection(Protocol):
    """Something open on behalf of a sandbox."""

    def recheck(self) -> Reason | None:
        """Returns why the sandbox's policy, as it is now, would not let it begin."""

    def abort(self) -> None:
        """Ends it at once, both ways, with a reset. Idempotent."""


class Denied(Exception):
    """Something that is not let through. `host` is what was asked for: text from the guest."""

    def __init__(self, reason: Reason, host: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.host = host


@dataclass(eq=False, slots=True)
class SandboxState:
    """One sandbox. `policy` and `secrets` are replaced whole by updates; readers take them anew for each decision."""

    id: str
    policy: Policy
    reporter: Reporter
    secrets: tuple[Secret, ...] = ()
    ca: LocalCa | None = None
    pins: DnsPins = field(default_factory=DnsPins)
    connections: set[Connection] = field(default_factory=set)

    def deny(self, reason: Reason, host: str, port: int, protocol: str) -> None:
        """Counts a denial. `protocol` is dns, tls, http or tcp."""
        self.reporter.deny(self.id, reason, host, port, protocol)

    def secrets_for(self, name: str, port: int) -> tuple[Secret, ...]:
        """Returns the secrets whose values may go to this (normalised) name."""
        return tuple(secret for secret in self.secrets if secret.is_for(name, port))

    def update(self, policy: Policy, secrets: tuple[Secret, ...], ca: LocalCa | None) -> int:
        """Replaces policy and secrets; ends what is no longer allowed and returns how many connections that were."""
        self.policy, self.secrets, self.ca = policy, secrets, ca
        ended = 0
        for connection in list(self.connections):
            if connection.recheck() is not None:
                connection.abort()
                self.deny(Reason.POLICY_CHANGED, "", 0, "tcp")
                ended += 1
        return ended

    def close(self) -> None:
        """Ends everything."""
        for connection in list(self.connections):
            connection.abort()
        self.connections.clear()
