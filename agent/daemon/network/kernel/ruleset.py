"""nftables ruleset of one sandbox: a pure function of its policy, loaded as one transaction.

Two tables in the sandbox's namespace. `guard` (netdev) sees every frame of the guest first and drops spoofed ones and
protocols that no policy covers. `egress` (inet) decides where the remaining packets may go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agent.common.model import GATEWAY_IPV4, GATEWAY_IPV6, GUEST_IPV4, GUEST_IPV6, GUEST_MAC, TAP_NAME
from agent.common.policy.addresses import BLOCKED_IPV4, BLOCKED_IPV6, GLOBAL_IPV6, IpRange
from agent.common.policy.policy import Policy
from agent.common.policy.reasons import KERNEL_REASONS
from agent.common.policy.rules import Rule

PROXY_PORT = 15001
DNS_PORT = 53
MARK = 0x5B
ROUTE_TABLE = 100
UPLINK = "up0"
GUARD, EGRESS = "guard", "egress"
_BURST_S = 0.25  # burst of a bandwidth limit
_MIN_BURST_BYTES = 64 << 10


def _host(cidr: str) -> str:
    return cidr.partition("/")[0]


GUEST4, GUEST6, GATEWAY4, GATEWAY6 = (_host(cidr) for cidr in (GUEST_IPV4, GUEST_IPV6, GATEWAY_IPV4, GATEWAY_IPV6))


@dataclass(frozen=True, slots=True)
class Mode:
    """Path of a sandbox's packets.

    :param proxied: TCP is redirected to the egress process.
    :param routed: packets that are not redirected leave through the uplink, by NAT.
    """

    proxied: bool
    routed: bool


def mode_of(policy: Policy, *, secrets: bool) -> Mode:
    """Return the path that the packets of a sandbox with this policy must take."""
    return Mode(proxied=policy.proxied(secrets=secrets), routed=policy.open)


def render(policy: Policy, mode: Mode, *, replace: bool) -> str:
    """Return the commands that load both tables.

    :param replace: delete existing tables first, which resets their counters; False for a fresh namespace, where
        loading takes a sixth of the time, since the kernel waits for all CPUs before it frees a table.
    """
    lines = []
    for table in (f"netdev {GUARD}", f"inet {EGRESS}") if replace else ():
        lines += [f"table {table}", f"delete table {table}"]  # the first line makes the second one never fail
    lines += ["table netdev guard {", *_counters(), *_guard(policy.limits.bytes_per_s), "}"]
    lines += ["table inet egress {", *_counters(), *_prerouting(policy, mode), *_hooks(policy, mode), "}"]
    return "\n".join(lines) + "\n"


def _counters() -> list[str]:
    return [f"counter {reason.value} {{ }}" for reason in KERNEL_REASONS]


def _drop(reason: str) -> str:
    return f"counter name {reason} drop"


def _guard(bytes_per_s: int) -> list[str]:
    rules = [
        f"ether saddr != {GUEST_MAC} {_drop('spoofed')}",
        f"ether type arp arp saddr ip {GUEST4} arp saddr ether {GUEST_MAC} accept",
        f"ether type arp {_drop('spoofed')}",
        # QEMU announces a restored guest so (RARP, RFC 903): dropped, but not counted as a denial.
        "ether type 0x8035 drop",
        f"ether type != {{ ip, ip6 }} {_drop('protocol_dropped')}",
        # Every Linux sends these when a link comes up (RFC 3376, 3810, 4861): not counted either.
        "ip daddr 224.0.0.22 drop",
        f"ip6 saddr {{ ::, {GUEST6}, fe80::/10 }} ip6 daddr ff02::16 drop",
        f"ip6 saddr {{ ::, {GUEST6}, fe80::/10 }} icmpv6 type nd-router-solicit drop",
        f"ip saddr != {GUEST4} {_drop('spoofed')}",
        "ip hdrlength != 5 " + _drop("protocol_dropped"),
        f"ip frag-off & 0x3fff != 0 {_drop('fragment')}",
        # Link-local sources are allowed for neighbour discovery only.
        "ip6 saddr { ::, fe80::/10 } icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept",
        f"ip6 saddr != {GUEST6} {_drop('spoofed')}",
        f"ip6 nexthdr {{ 0, 43, 44, 51, 60, 135, 139, 140 }} {_drop('fragment')}",
        f"icmpv6 type {{ nd-router-advert, nd-router-solicit, nd-redirect }} {_drop('spoofed')}",
    ]
    chains = [
        "chain from_guest {",
        f'type filter hook ingress device "{TAP_NAME}" priority -500; policy accept;',
        *rules,
    ]
    return [*chains, *_bandwidth(bytes_per_s), "}"]


def _bandwidth(bytes_per_s: int) -> list[str]:
    if not bytes_per_s:
        return []
    burst = max(int(bytes_per_s * _BURST_S), _MIN_BURST_BYTES)
    return [f"limit rate over {bytes_per_s} bytes/second burst {burst} bytes {_drop('rate_dropped')}"]


def _prerouting(policy: Policy, mode: Mode) -> list[str]:
    """Return the chain before routing, which has most of the policy."""
    new = "tcp flags & (syn | ack) == syn"
    rules = [
        f'iifname != "{TAP_NAME}" accept',
        f"ip daddr {GATEWAY4} meta l4proto {{ tcp, udp }} th dport {DNS_PORT} accept",
        f"ip6 daddr {GATEWAY6} meta l4proto {{ tcp, udp }} th dport {DNS_PORT} accept",
        "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept",
        f"fib daddr type {{ local, broadcast, multicast, anycast }} {_drop('host_dropped')}",
    ]
    if policy.limits.connections_per_s:
        rate = policy.limits.connections_per_s
        rules.append(f"{new} limit rate over {rate}/second burst {max(rate, 5)} packets {_drop('rate_dropped')}")
    if mode.proxied:
        rules.append(f"meta l4proto tcp tproxy to :{PROXY_PORT} meta mark set {MARK} accept")
        # QUIC would bypass the proxy; without it, clients fall back to TCP.
        rules.append(f"udp dport {{ 80, 443 }} {_drop('udp_not_allowed')}")
    else:
        # Connections that the proxy accepted before the policy became open stay with it.
        rules.append(f"meta l4proto tcp socket transparent 1 meta mark set {MARK} accept")
    if not mode.routed:
        rules += [f"meta l4proto udp {_drop('udp_not_allowed')}", _drop("protocol_dropped")]
    else:
        rules += _open(policy)
    return ["chain prerouting {", "type filter hook prerouting priority mangle; policy accept;", *rules, "}"]


def _open(policy: Policy) -> list[str]:
    rules = [f"meta l4proto != {{ tcp, udp, icmp, icmpv6 }} {_drop('protocol_dropped')}"]
    rules += _matching(policy.deny, _drop("private_dropped"))
    rules += [f"{_destination(network)} accept" for network in policy.permitted]
    for networks in (BLOCKED_IPV4, BLOCKED_IPV6):
        rules.append(f"{_destinations(networks)} {_drop('private_dropped')}")
    rules.append(f"meta nfproto ipv6 ip6 daddr != {GLOBAL_IPV6} {_drop('private_dropped')}")
    return rules


def _matching(rules: Iterable[Rule], verdict: str) -> list[str]:
    """Return lines for the rules with addresses; rules with names are applied by the proxy."""
    lines = []
    for rule in rules:
        if rule.network is not None:
            port = f" meta l4proto {{ tcp, udp }} th dport {rule.port}" if rule.port is not None else ""
            lines.append(f"{_destination(rule.network)}{port} {verdict}")
    return lines


def _family(network: IpRange) -> str:
    return "ip" if network.version == 4 else "ip6"


def _destination(network: IpRange) -> str:
    return f"{_family(network)} daddr {network}"


def _destinations(networks: Sequence[IpRange]) -> str:
    return f"{_family(networks[0])} daddr {{ {', '.join(map(str, networks))} }}"


def _hooks(policy: Policy, mode: Mode) -> list[str]:
    forward = []
    if mode.routed:
        limit = policy.limits.connections
        if limit and not mode.proxied:
            forward.append(f'iifname "{TAP_NAME}" ct state new ct count over {limit} {_drop("rate_dropped")}')
        forward += [
            f'iifname "{TAP_NAME}" oifname "{UPLINK}" accept',
            f'iifname "{UPLINK}" oifname "{TAP_NAME}" ct state established,related accept',
        ]
    lines = [
        "chain input {", "type filter hook input priority filter; policy drop;",
        'iifname "lo" accept',
        f"meta mark {MARK} accept",
        f'iifname "{TAP_NAME}" meta l4proto {{ tcp, udp }} th dport {DNS_PORT} accept',
        f'iifname "{TAP_NAME}" icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept',
    ]  # fmt: skip
    if mode.routed:
        lines += [
            f'iifname "{UPLINK}" icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept',
            "ct state established,related accept",
        ]
    lines += ["}", "chain forward {", "type filter hook forward priority filter; policy drop;", *forward, "}"]
    lines += [
        "chain to_guest {", "type filter hook postrouting priority filter; policy accept;",
        f'oifname != "{TAP_NAME}" accept', *_bandwidth(policy.limits.bytes_per_s), "}",
    ]  # fmt: skip
    if mode.routed:
        lines += [
            "chain nat {", "type nat hook postrouting priority srcnat; policy accept;",
            f'oifname "{UPLINK}" masquerade', "}",
        ]  # fmt: skip
    return lines
