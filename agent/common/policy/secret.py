"""A secret as the egress process holds it: the placeholder that the guest has, the value that approved hosts get."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from agent.common.policy.rules import Rule, parse_rule


@dataclass(frozen=True, slots=True)
class Secret:
    """One secret of one sandbox. `value` is in no repr.

    :param name: of the environment variable that holds the placeholder.
    :param hosts: where the value goes in; names and wildcards, each with an optional port (443 where there is none).
    :param in_body: whether it is put into request bodies, too.
    :param redact: whether the value is turned back into the placeholder in what these hosts answer.
    """

    name: str
    placeholder: str
    value: str = field(repr=False)
    hosts: tuple[Rule, ...]
    in_body: bool = False
    redact: bool = True

    def is_for(self, name: str, port: int) -> bool:
        """Whether the value may go to this (normalised) name and port."""
        return any(rule.has_name(name) and (rule.port or 443) == port for rule in self.hosts)

    def to_json(self) -> dict[str, Any]:
        """Returns the secret, value included, as JSON values: for the egress process alone."""
        return {
            "name": self.name, "placeholder": self.placeholder, "value": self.value,
            "hosts": [str(rule) for rule in self.hosts], "in_body": self.in_body, "redact": self.redact,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Secret:
        """Returns what `to_json` was called on. :raises ValueError, KeyError, TypeError, InvalidSpec: it is not one."""
        return cls(**{**value, "hosts": tuple(parse_rule(text) for text in value["hosts"])})
