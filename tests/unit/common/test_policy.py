"""What sandboxes may reach: rules from text and back, names and addresses held against them."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.common.errors import InvalidSpec
from agent.common.policy.addresses import is_blocked, parse_network
from agent.common.policy.hosts import normalise, same_or_none
from agent.common.policy.policy import EgressLimits, Policy
from agent.common.policy.reasons import Reason
from agent.common.policy.rules import MAX_RULES, parse_rule, parse_rules
from agent.common.policy.secret import Secret


def policy(*allow: str, **others: object) -> Policy:
    return replace(Policy(allow=parse_rules(allow, "allow")), **others)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Example.COM", "example.com"), ("example.com.", "example.com"), (" example.com:443", "example.com:443"),
        ("*.Example.com", "*.example.com"), ("bücher.example", "xn--bcher-kva.example"), ("1.2.3.4", "1.2.3.4"),
        ("1.2.3.4:80", "1.2.3.4:80"), ("10.1.2.3/8", "10.0.0.0/8"), ("[2001:DB8::1]:443", "[2001:db8::1]:443"),
        ("2001:db8::1", "[2001:db8::1]"), ("[2001:db8::]/32", None), ("[2001:db8::/32]:53", "[2001:db8::/32]:53"),
        ("_dmarc.example.com", "_dmarc.example.com"), ("xn--bcher-kva.example", "xn--bcher-kva.example"),
    ],
)  # fmt: skip
def test_a_rule_has_one_form(text: str, same: str | None) -> None:
    if same is None:
        with pytest.raises(InvalidSpec):
            parse_rule(text)
        return
    rule = parse_rule(text)
    assert str(rule) == same
    assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a host name"), ("*", "leave the list out"), ("https://example.com/x", "without scheme"),
        ("a..b", "not a host name"), ("example.com:0", "1 to 65535"), ("example.com:99999", "1 to 65535"),
        ("example.com:https", "1 to 65535"), ("exa mple.com", "not a host name"), ("*.*.a.com", "not a host name"),
        ("[1.2.3.4]", "brackets are for IPv6"), ("[::g]", "not an IPv6 address"), ("1.2.3", "nor a valid address"),
        ("0x7f000001", "nor a valid address"), ("1.2.3.4.5", "nor a valid address"),
        ("a" * 64 + ".com", "labels of 1 to 63"),
        ("a" * 301, "over 300 characters"), ("-a.com", "not a host name"), ("\u2024.com", "host name"),
    ],
)  # fmt: skip
def test_what_is_no_rule_is_refused_with_advice(text: str, says: str) -> None:
    with pytest.raises(InvalidSpec, match=says):
        parse_rule(text)


def test_too_many_rules() -> None:
    with pytest.raises(InvalidSpec, match="wildcards or ranges"):
        parse_rules((f"h{number}.example" for number in range(MAX_RULES + 1)), "allow")
    assert len(parse_rules(["a.example", "A.example."], "allow")) == 1


@given(st.text(max_size=60))
def test_any_text_gives_a_rule_or_a_clear_error(text: str) -> None:
    try:
        rule = parse_rule(text)
    except InvalidSpec:
        return
    assert parse_rule(str(rule)) == rule


@given(st.text(max_size=80))
def test_normal_names_stay_as_they_are(text: str) -> None:
    name = same_or_none(text)
    assert name is None or normalise(name) == name


@pytest.mark.parametrize(
    ("rule", "name", "port", "reason"),
    [
        ("example.com", "example.com", 443, None),
        ("example.com", "www.example.com", 443, Reason.HOST_NOT_ALLOWED),
        ("*.example.com", "www.example.com", 22, None),
        ("*.example.com", "a.b.example.com", 22, None),
        ("*.example.com", "example.com", 443, Reason.HOST_NOT_ALLOWED),
        ("*.example.com", "badexample.com", 443, Reason.HOST_NOT_ALLOWED),
        ("example.com:443", "example.com", 80, Reason.PORT_NOT_ALLOWED),
        ("example.com:443", "example.com", 443, None),
        ("1.2.3.4", "example.com", 443, Reason.HOST_NOT_ALLOWED),
    ],
)
def test_names(rule: str, name: str, port: int, reason: Reason | None) -> None:
    assert policy(rule).check_name(name, port) is reason
    assert policy(rule).looks_up(name) is (reason is not Reason.HOST_NOT_ALLOWED)


def test_nothing_is_allowed_by_an_empty_list_and_all_by_none() -> None:
    assert policy().check_name("example.com", 443) is Reason.HOST_NOT_ALLOWED
    assert not policy().looks_up("example.com")
    assert policy().check_address(ip_address("93.184.216.34"), 443) is Reason.ADDRESS_NOT_ALLOWED
    assert Policy().open
    assert Policy().check_name("example.com", 443) is None
    assert Policy().check_address(ip_address("93.184.216.34"), 25) is None
    assert Policy().check_address(ip_address("10.0.0.1"), 25) is Reason.BLOCKED_ADDRESS


def test_addresses_pass_only_when_listed() -> None:
    assert policy("93.184.216.0/24:443").check_address(ip_address("93.184.216.34"), 443) is None
    assert policy("93.184.216.0/24:443").check_address(ip_address("93.184.216.34"), 80) is Reason.PORT_NOT_ALLOWED
    assert policy("example.com").check_address(ip_address("93.184.216.34"), 443) is Reason.ADDRESS_NOT_ALLOWED
    # A caller cannot list its way into private ranges; the operator can.
    assert policy("10.0.0.0/8").check_address(ip_address("10.1.1.1"), 443) is Reason.BLOCKED_ADDRESS
    permitted = policy("10.0.0.0/8", permitted=(parse_network("10.1.0.0/16"),))
    assert permitted.check_address(ip_address("10.1.1.1"), 443) is None
    assert permitted.check_address(ip_address("10.2.1.1"), 443) is Reason.BLOCKED_ADDRESS


def test_the_operator_wins() -> None:
    held = policy(
        "example.com", "*.example.org", deny=parse_rules(["bad.example.org", "5.6.7.8", "example.com:25"], "deny"),
        always=parse_rules(["mirror.example.net"], "always"),
    )  # fmt: skip
    assert held.check_name("bad.example.org", 443) is Reason.DENIED_BY_OPERATOR
    assert not held.looks_up("bad.example.org")
    assert held.check_name("example.com", 25) is Reason.DENIED_BY_OPERATOR
    assert held.looks_up("example.com")
    assert held.check_name("mirror.example.net", 80) is None
    assert held.check_dialled(ip_address("5.6.7.8"), 443) is Reason.DENIED_BY_OPERATOR
    assert held.check_dialled(ip_address("64:ff9b::506:708"), 443) is Reason.DENIED_BY_OPERATOR


def test_a_tenant_cannot_widen_its_ceiling() -> None:
    ceiling = parse_rules(["*.example.com:443"], "ceiling")
    open_caller = Policy(ceiling=ceiling)
    assert not open_caller.open
    assert open_caller.check_name("api.example.com", 443) is None
    assert open_caller.check_name("example.org", 443) is Reason.HOST_NOT_ALLOWED
    greedy = policy("example.org", "api.example.com", ceiling=ceiling)
    assert greedy.check_name("example.org", 443) is Reason.HOST_NOT_ALLOWED
    assert not greedy.looks_up("example.org")
    assert greedy.check_name("api.example.com", 80) is Reason.PORT_NOT_ALLOWED
    assert greedy.check_name("api.example.com", 443) is None


def test_when_tcp_must_be_proxied() -> None:
    assert not Policy().proxied(secrets=False)
    assert Policy().proxied(secrets=True)
    assert policy("example.com").proxied(secrets=False)
    assert Policy(deny=parse_rules(["bad.example"], "deny")).proxied(secrets=False)
    assert not Policy(deny=parse_rules(["5.6.7.8"], "deny")).proxied(secrets=False)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.0.0.1", "127.0.0.1", "169.254.169.254", "172.31.0.1", "192.168.1.1", "100.64.0.1", "224.0.0.1",
        "255.255.255.255", "198.18.0.1", "240.0.0.1", "::", "::1", "fe80::1", "fd00::1", "ff02::1", "::ffff:8.8.8.8",
        "::ffff:10.0.0.1", "64:ff9b::a00:1", "2001:db8::1", "2002:a00:1::", "2001::1", "fec0::1", "::10.0.0.1",
        "100::1", "64:ff9b:1::1",
    ],
)  # fmt: skip
def test_blocked_addresses(address: str) -> None:
    assert is_blocked(ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "64:ff9b::808:808", "100.128.0.1"])
def test_public_addresses(address: str) -> None:
    assert not is_blocked(ip_address(address))


@given(st.ip_addresses(v=4))
def test_blocked_ipv4_contains_all_that_python_calls_not_global(address: IPv4Address) -> None:
    # Multicast counts as global there; of 192.0.0.0/24 two anycast addresses do.
    assert is_blocked(address) or address.is_global


@given(st.ip_addresses(v=6))
def test_blocked_ipv6_contains_all_that_python_calls_not_global(address: IPv6Address) -> None:
    assert is_blocked(address) or address.is_global or address.sixtofour is not None or address.teredo is not None


def test_a_policy_survives_json() -> None:
    full = policy(
        "example.com:443", "*.example.org", "1.2.3.4", always=parse_rules(["a.example"], ""),
        deny=parse_rules(["b.example"], ""), ceiling=parse_rules(["*.example.org"], ""),
        permitted=(parse_network("10.0.0.0/8"),), inspect=True, limits=EgressLimits(5, 6, 7),
    )  # fmt: skip
    for value in (full, Policy(), policy()):
        assert Policy.from_json(json.loads(json.dumps(value.to_json()))) == value


def test_a_secret_is_for_its_hosts_and_shows_its_value_to_nobody() -> None:
    secret = Secret("KEY", "placeholder", "t0p", parse_rules(["api.example.com", "*.example.org:8443"], "hosts"))
    assert secret.is_for("api.example.com", 443)
    assert not secret.is_for("api.example.com", 8443)
    assert secret.is_for("x.example.org", 8443)
    assert not secret.is_for("x.example.org", 443)
    assert not secret.is_for("example.org", 8443)
    assert "t0p" not in repr(secret)
    assert Secret.from_json(json.loads(json.dumps(secret.to_json()))) == secret
