"""Settings of network access and its enforcement: section [egress] of the settings file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.common.errors import InvalidSpec
from agent.common.policy.addresses import parse_network, parse_server
from agent.common.policy.rules import parse_rules
from agent.common.quantities import Bytes


@dataclass(frozen=True, slots=True)
class EgressSettings:
    """Limits on the network access of all sandboxes, and the egress process that enforces them.

    Rules are hosts, addresses or ranges, each with an optional port (`agent.common.policy.rules`).

    :param control: control socket of an egress process that systemd or an operator runs; empty: the agent starts one.
    :param uplink: network namespace (of `ip netns`) with the route to the internet; empty: the agent's own.
    :param uid: user of the egress process, with group `gid`.
    :param resolvers: DNS servers, "address" or "address:port"; empty: those of /etc/resolv.conf.
    :param upstream_ca_file: PEM file of CAs that servers of inspected connections may have, besides the host's.
    :param always: rules for destinations that every sandbox can reach.
    :param deny: rules for destinations that no sandbox can reach.
    :param permit_private: private ranges that are not blocked, such as "10.1.0.0/16".
    :param tenants: by tenant, the destinations that its sandboxes can reach at most, as rules with commas between.
    :param pool_ipv4: addresses between sandboxes and uplink, for no other use; `pool_ipv6` likewise.
    :param connections: open connections per sandbox through the egress process; 0: no limit.
    :param connections_per_s: new connections per second and sandbox; 0: no limit.
    :param bytes_per_s: bytes per second and sandbox in each direction; 0: no limit.
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
        """Check the values that need more than their types.

        :raises ValueError: a value is not valid; the message names it.
        """
        if not (self.uid and self.gid):
            raise ValueError("egress.uid and egress.gid must not be root's (0)")
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
