"""What one sandbox may reach: the caller's list, held down by the operator's. Pure: no I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Any

from agent.common.policy.addresses import Address, IpRange, embedded_ipv4, is_blocked, parse_network
from agent.common.policy.reasons import Reason
from agent.common.policy.rules import Rule, parse_rule


@dataclass(frozen=True, slots=True)
class EgressLimits:
    """Per sandbox; 0: none."""

    connections: int = 1024  # open at once through the proxy
    connections_per_s: int = 0
    bytes_per_s: int = 0  # each way


@dataclass(frozen=True, slots=True)
class Policy:
    """The effective policy of a sandbox.

    :param allow: what may be reached; None: the open internet.
    :param always: what the operator lets every sandbox reach, whatever its caller listed.
    :param ceiling: what the tenant may reach at most; None: no such limit.
    :param deny: what no sandbox may reach; wins over everything.
    :param permitted: blocked ranges (private addresses and the like) that the operator lets through.
    :param inspect: open all TLS to allowed names, not only that to hosts of secrets: the Host inside is checked, too.
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
        """Whether everything public may be reached but what is denied."""
        return self.allow is None and self.ceiling is None

    def proxied(self, *, secrets: bool) -> bool:
        """Whether TCP must go through the proxy: where names decide. Otherwise the kernel's rules alone can hold it."""
        return not self.open or secrets or self.inspect or any(rule.network is None for rule in self.deny)

    def check_name(self, name: str, port: int) -> Reason | None:
        """Returns why the (normalised) name may not be reached on this port; None if it may."""
        if any(rule.has_name(name) and rule.has_port(port) for rule in self.deny):
            return Reason.DENIED_BY_OPERATOR
        return self._check(lambda rule: rule.has_name(name), port, Reason.HOST_NOT_ALLOWED)

    def check_address(self, address: Address, port: int) -> Reason | None:
        """Returns why the address, as itself and not as some name's, may not be reached on this port."""
        reason = self.check_dialled(address, port)
        return reason or self._check(lambda rule: rule.has_address(address), port, Reason.ADDRESS_NOT_ALLOWED)

    def check_dialled(self, address: Address, port: int) -> Reason | None:
        """Returns why nobody may be connected to this address, whatever name led there."""
        embedded = embedded_ipv4(address) if isinstance(address, IPv6Address) else None
        for rule in self.deny:
            if rule.has_port(port) and (
                rule.has_address(address) or (embedded is not None and rule.has_address(embedded))
            ):
                return Reason.DENIED_BY_OPERATOR
        return Reason.BLOCKED_ADDRESS if is_blocked(address, self.permitted) else None

    def looks_up(self, name: str) -> bool:
        """Whether the resolver answers for this (normalised) name: some port of it may be reached."""
        if any(rule.port is None and rule.has_name(name) for rule in self.deny):
            return False
        if any(rule.has_name(name) for rule in self.always):
            return True
        return all(rules is None or any(rule.has_name(name) for rule in rules) for rules in (self.allow, self.ceiling))

    def names_port(self, name: str, port: int) -> bool:
        """Whether a rule states this name together with this port: then what is spoken there is the caller's affair."""
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
        """Returns the policy as JSON values."""
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
        """Returns what `to_json` was called on. :raises ValueError, KeyError, TypeError, InvalidSpec: it is not one."""

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
