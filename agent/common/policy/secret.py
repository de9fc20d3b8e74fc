"""Secrets with their values, as the egress process has them: it replaces a placeholder by the value for some hosts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from agent.common.policy.rules import Rule, parse_rule


@dataclass(frozen=True, slots=True)
class Secret:
    """One secret of one sandbox; its repr leaves the value out.

    :param name: environment variable that holds the placeholder.
    :param placeholder: text that the guest has instead of the value.
    :param hosts: rules for host names that get the value, on the rule's port or 443.
    :param in_body: whether placeholders in request bodies are replaced, too, not only those in headers.
    :param redact: whether the value is replaced by the placeholder in responses of these hosts.
    """

    name: str
    placeholder: str
    value: str = field(repr=False)
    hosts: tuple[Rule, ...]
    in_body: bool = False
    redact: bool = True

    def is_for(self, name: str, port: int) -> bool:
        """Whether the value may be sent to this normalised host name and port."""
        return any(rule.has_name(name) and (rule.port or 443) == port for rule in self.hosts)

    def to_json(self) -> dict[str, Any]:
        """Return the secret, with its value, as JSON values; for the egress process only."""
        return {
            "name": self.name, "placeholder": self.placeholder, "value": self.value,
            "hosts": [str(rule) for rule in self.hosts], "in_body": self.in_body, "redact": self.redact,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Secret:
        """Return the secret that `to_json` rendered.

        :raises KeyError: a field is missing.
        :raises TypeError: a field is unknown or has another type.
        :raises InvalidSpec: a rule is malformed.
        """
        return cls(**{**value, "hosts": tuple(parse_rule(text) for text in value["hosts"])})


@dataclass(frozen=True, slots=True)
class CaPair:
    """Certificate and key of a sandbox's CA, as PEM."""

    certificate_pem: str
    key_pem: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class EgressSecrets:
    """Secrets of one sandbox, with their values, and its CA; None: no connection is opened."""

    secrets: tuple[Secret, ...] = ()
    ca: CaPair | None = None
