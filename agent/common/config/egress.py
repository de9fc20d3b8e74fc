"""Settings of what sandboxes may reach: section [egress] of the settings file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.common.errors import InvalidSpec
from agent.common.policy.addresses import parse_network, parse_server
from agent.common.policy.rules import parse_rules
from agent.common.quantities import Bytes


@dataclass(frozen=True, slots=True)
class EgressSettings:
    """What sandboxes may reach, as the operator has it, and how it is enforced.

    `control` is the socket of an egress process that somebody else keeps, such as systemd; empty: the agent starts one
    itself. `uplink` is the network namespace (of `ip netns`) that leads out, empty for the agent's own. `uid` and `gid`
    are whom the egress process runs as. `resolvers` are "address" or "address:port"; without any, those of
    /etc/resolv.conf. `always` and `deny` are lists of rules (hosts, addresses, ranges, each with an optional port):
    what every sandbox may reach and what none may. `permit_private` are ranges that would be blocked, such as
    "10.1.0.0/16". `tenants` has the most that a tenant's sandboxes may reach, as rules with commas between.
    `pool_ipv4` and `pool_ipv6` are addresses between sandboxes and uplink, which nothing else may use. Limits are per
    sandbox; 0: none.
    """

    control: str = ""
    uplink: str = ""
    uid: int = 65534
    gid: int = 65534
    resolvers: tuple[str, ...] = ()
    upstream_ca_file: str = ""
    always: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    permit_private: tuple[str, ...] = ()
    tenants: Mapping[str, str] = field(default_factory=dict)
    pool_ipv4: str = "100.64.0.0/10"
    pool_ipv6: str = "fd73:6279::/48"
    connections: int = 1024
    connections_per_s: int = 0
    bytes_per_s: Bytes = 0

    def check(self) -> None:
        """:raises ValueError: a value is of no use; the message names it."""
        if not (self.uid and self.gid):
            raise ValueError("egress.uid and egress.gid must be a user's and a group's that are not root's")
        lists = {"always": self.always, "deny": self.deny}
        lists |= {f"tenants.{name}": tuple(rules.split(",")) for name, rules in self.tenants.items()}
        for name, rules in lists.items():
            try:
                parse_rules((rule for rule in rules if rule.strip()), name)
            except InvalidSpec as error:
                raise ValueError(f"egress.{name}: {error.message}") from None
        ranges: list[tuple[str, str, int | None]] = [("permit_private", text, None) for text in self.permit_private]
        ranges += [("pool_ipv4", self.pool_ipv4, 4), ("pool_ipv6", self.pool_ipv6, 6)]
        for name, text, version in ranges:
            try:
                network = parse_network(text)
            except ValueError as error:
                raise ValueError(f"egress.{name}: {error}; write a range such as 10.1.0.0/16") from None
            if version not in (None, network.version):
                raise ValueError(f"egress.{name} is {text}; it must be a range of IPv{version}")
        for server in self.resolvers:
            try:
                parse_server(server)
            except ValueError as error:
                raise ValueError(
                    f"egress.resolvers: {error}; write 192.0.2.1, 192.0.2.1:53 or [2001:db8::1]:53"
                ) from None
