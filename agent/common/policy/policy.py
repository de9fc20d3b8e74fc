"""Effective network policy of one sandbox: the caller's list within the operator's rules. Pure: no I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Any

from agent.common.policy.addresses import Address, IpRange, embedded_ipv4, is_blocked, parse_network
from agent.common.policy.reasons import Reason
from agent.common.policy.rules import Rule, parse_rule


@dataclass(frozen=True, slots=True)
class EgressLimits:
    """Limits of one sandbox; 0: unlimited."""

    connections: int = 1024  # open at once through the proxy
    connections_per_s: int = 0
    bytes_per_s: int = 0  # each way


@dataclass(frozen=True, slots=True)
class Policy:
    """Allow and deny lists, in the order of precedence: deny, always, then allow within ceiling.

    :param allow: destinations of the caller's list; None: the whole public internet.
    :param always: destinations that the operator allows for every sandbox.
    :param ceiling: destinations that the tenant's sandboxes may reach at most; None: no such limit.
    :param deny: destinations that no sandbox may reach.
    :param permitted: private ranges that are not blocked on this node.
    :param inspect: intercept all TLS to allowed names, to check the Host header inside, not only TLS to hosts of
        secrets.
    """

    allow: tuple[Rule, ...] | None = None
    always: tuple[Rule, ...] = ()
    ceiling: tuple[Rule, ...] | None = None
    deny: tuple[Rule, ...] = ()
    permitted: tuple[IpRange, ...] = ()
    inspect: bool = False
    limits: EgressLimits = EgressLimits()

    @property
    def open(self) -> bool:
        """Whether every public destination may be reached, but for denied ones."""
        return self.allow is None and self.ceiling is None

    def proxied(self, *, secrets: bool) -> bool:
        """Whether TCP must go through the proxy, since names or content decide; else the kernel's rules are enough."""
        return not self.open or secrets or self.inspect or any(rule.network is None for rule in self.deny)

    def check_name(self, name: str, port: int) -> Reason | None:
        """Return why a normalised host name may not be reached on this port; None if it may."""
        if any(rule.has_name(name) and rule.has_port(port) for rule in self.deny):
            return Reason.DENIED_BY_OPERATOR
        return self._check(lambda rule: rule.has_name(name), port, Reason.HOST_NOT_ALLOWED)

    def check_address(self, address: Address, port: int) -> Reason | None:
        """Return why an address that no allowed name resolved to may not be reached; None if it may."""
        reason = self.check_dialled(address, port)
        return reason or self._check(lambda rule: rule.has_address(address), port, Reason.ADDRESS_NOT_ALLOWED)

    def check_dialled(self, address: Address, port: int) -> Reason | None:
        """Return why an address may not be connected to, even as the address of an allowed name; None if it may."""
        embedded = embedded_ipv4(address) if isinstance(address, IPv6Address) else None
        for rule in self.deny:
            if rule.has_port(port) and (
                rule.has_address(address) or (embedded is not None and rule.has_address(embedded))
            ):
                return Reason.DENIED_BY_OPERATOR
        return Reason.BLOCKED_ADDRESS if is_blocked(address, self.permitted) else None

    def looks_up(self, name: str) -> bool:
        """Whether the resolver answers for this normalised host name: at least one port of it may be reached."""
        if any(rule.port is None and rule.has_name(name) for rule in self.deny):
            return False
        if any(rule.has_name(name) for rule in self.always):
            return True
        return all(rules is None or any(rule.has_name(name) for rule in rules) for rules in (self.allow, self.ceiling))

    def names_port(self, name: str, port: int) -> bool:
        """Whether a rule allows this name with this very port: then any protocol may be spoken there."""
        return any(rule.port == port and rule.has_name(name) for rule in (*(self.allow or ()), *self.always))

    def _check(self, matches: Any, port: int, unknown: Reason) -> Reason | None:
        if any(matches(rule) and rule.has_port(port) for rule in self.always):
            return None
        for rules in (self.allow, self.ceiling):
            if rules is None:
                continue
            found = [rule for rule in rules if matches(rule)]
            if not any(rule.has_port(port) for rule in found):
                return Reason.PORT_NOT_ALLOWED if found else unknown
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the policy as JSON values."""
        return {
            "allow": None if self.allow is None else [str(rule) for rule in self.allow],
            "always": [str(rule) for rule in self.always],
            "ceiling": None if self.ceiling is None else [str(rule) for rule in self.ceiling],
            "deny": [str(rule) for rule in self.deny],
            "permitted": [str(network) for network in self.permitted],
            "inspect": self.inspect,
            "limits": [self.limits.connections, self.limits.connections_per_s, self.limits.bytes_per_s],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Policy:
        """Return the policy that `to_json` rendered.

        :raises KeyError: a field is missing.
        :raises TypeError: a field has another type.
        :raises ValueError: a range is malformed.
        :raises InvalidSpec: a rule is malformed.
        """

        def rules(key: str) -> tuple[Rule, ...]:
            return tuple(parse_rule(text) for text in value[key])

        return cls(
            allow=None if value["allow"] is None else rules("allow"),
            always=rules("always"),
            ceiling=None if value["ceiling"] is None else rules("ceiling"),
            deny=rules("deny"),
            permitted=tuple(parse_network(text) for text in value["permitted"]),
            inspect=bool(value["inspect"]),
            limits=EgressLimits(*value["limits"]),
        )
