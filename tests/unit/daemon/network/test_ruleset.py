"""Rules and addresses as they are rendered: that the kernel takes and keeps to them, integration tests show."""

from __future__ import annotations

import pytest

from agent.common.errors import ResourceExhausted
from agent.common.policy.addresses import parse_network
from agent.common.policy.policy import EgressLimits, Policy
from agent.common.policy.reasons import KERNEL_REASONS
from agent.common.policy.rules import parse_rules
from agent.daemon.network.kernel import uplink
from agent.daemon.network.kernel.pool import AddressPool
from agent.daemon.network.kernel.ruleset import Mode, mode_of, render


def policy(*allow: str, **fields: object) -> Policy:
    return Policy(allow=parse_rules(allow, "allow"), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "secrets", "mode"),
    [
        (Policy(), False, Mode(proxied=False, routed=True)),
        (Policy(), True, Mode(proxied=True, routed=True)),
        (Policy(inspect=True), False, Mode(proxied=True, routed=True)),
        (Policy(deny=parse_rules(["a.example"], "x")), False, Mode(proxied=True, routed=True)),
        (Policy(deny=parse_rules(["1.2.3.4"], "x")), False, Mode(proxied=False, routed=True)),
        (policy(), False, Mode(proxied=True, routed=False)),
        (policy("a.example"), True, Mode(proxied=True, routed=False)),
        (Policy(ceiling=parse_rules(["a.example"], "x")), False, Mode(proxied=True, routed=False)),
    ],
)
def test_how_packets_go(given: Policy, secrets: bool, mode: Mode) -> None:
    assert mode_of(given, secrets=secrets) == mode


def test_closed_is_the_default_and_nothing_is_routed() -> None:
    text = render(policy("a.example"), Mode(proxied=True, routed=False), replace=False)
    assert "masquerade" not in text
    assert "tproxy" in text
    assert text.count("policy drop") == 2  # input and forward
    assert 'oifname "up0"' not in text
    assert "ct state" not in text  # nothing is tracked: that would be paid for by every packet


def test_open_lets_out_what_is_public_and_not_denied() -> None:
    given = Policy(
        deny=parse_rules(["45.0.0.1:80", "[2a0a::1]"], "x"), permitted=(parse_network("10.1.0.0/16"),),
        limits=EgressLimits(connections=7, connections_per_s=3, bytes_per_s=1 << 20),
    )  # fmt: skip
    text = render(given, mode_of(given, secrets=False), replace=True)
    permitted, blocked = text.index("ip daddr 10.1.0.0/16 accept"), text.index("10.0.0.0/8")
    assert text.index("ip daddr 45.0.0.1/32 meta l4proto { tcp, udp } th dport 80") < permitted < blocked
    assert "ip6 daddr 2a0a::1/128" in text
    for part in ("ct count over 7", "limit rate over 3/second", "limit rate over 1048576 bytes/second", "masquerade"):
        assert part in text
    assert "delete table netdev guard" in text
    assert all(f"counter {reason.value} {{ }}" in text for reason in KERNEL_REASONS)


def test_slots_come_back_lowest_first_and_end() -> None:
    pool = AddressPool("100.64.0.0/29", "fd73:6279::/64")
    assert [pool.allocate() for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ResourceExhausted, match="pools larger"):
        pool.allocate()
    pool.release(2)
    pool.release(0)
    pool.release(0)
    assert [pool.allocate(), pool.allocate()] == [0, 2]
    assert len(pool) == 4
    again = AddressPool("100.64.0.0/29", "fd73:6279::/64")
    again.reserve(0)
    assert again.allocate() == 1
    pair = again.pair(1)
    assert (str(pair.outer4), str(pair.inner4), str(pair.inner6)) == ("100.64.0.2", "100.64.0.3", "fd73:6279::3")


def test_the_uplink_keeps_sandboxes_from_the_host_and_each_other() -> None:
    text = uplink.render(AddressPool("100.64.0.0/10", "fd73:6279::/48"))
    assert 'iifname "sbx*" counter drop' in text
    assert 'iifname "sbx*" oifname "sbx*" counter drop' in text
    assert 'ip saddr 100.64.0.0/10 oifname != "sbx*" masquerade' in text
