"""Denials and their reasons, as counters, events and error answers name them; each states one fact."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Reason of a denial, which the egress process reports; the last group is counted by the kernel's rules."""

    # Names and addresses.
    HOST_NOT_ALLOWED = "host_not_allowed"  # no rule matches the name
    PORT_NOT_ALLOWED = "port_not_allowed"  # a rule matches the name or address, but not the port
    ADDRESS_NOT_ALLOWED = "address_not_allowed"  # no rule lists the address, and no allowed name resolved to it
    ADDRESS_MISMATCH = "address_mismatch"  # the name is allowed, but did not resolve to the address that was dialled
    DENIED_BY_OPERATOR = "denied_by_operator"
    BLOCKED_ADDRESS = "blocked_address"  # private, loopback, link-local, metadata, multicast, or an address of the host
    # DNS.
    DNS_NOT_ALLOWED = "dns_not_allowed"  # lookup of a name that no rule matches
    DNS_BLOCKED_ANSWER = "dns_blocked_answer"  # the name is allowed, but all of its addresses are blocked
    DNS_MALFORMED = "dns_malformed"
    # Content of connections.
    NO_SERVER_NAME = "no_server_name"  # TLS without SNI, or HTTP without Host
    HOST_MISMATCH = "host_mismatch"  # Host or :authority differs from the name of the connection
    MALFORMED = "malformed"  # invalid or ambiguous TLS or HTTP (request smuggling)
    PROTOCOL_NOT_ALLOWED = "protocol_not_allowed"  # neither TLS nor HTTP, on a port where only these can be checked
    TOO_LARGE = "too_large"  # header section, TLS hello or DNS message over its limit
    TIMEOUT = "timeout"  # the first message did not arrive in time
    TOO_MANY_CONNECTIONS = "too_many_connections"
    UPSTREAM_UNVERIFIED = "upstream_unverified"  # the server's certificate does not match the name
    POLICY_CHANGED = "policy_changed"  # an open connection that the new policy does not allow
    SECRET_WITHHELD = "secret_withheld"  # noqa: S105  a placeholder was sent, unreplaced, to a host that must not get the value
    # Counted by the kernel's rules.
    SPOOFED = "spoofed"  # source address, MAC or ARP claim of another than this guest
    UDP_NOT_ALLOWED = "udp_not_allowed"
    PROTOCOL_DROPPED = "protocol_dropped"  # neither TCP, UDP nor echo; VLAN tags; frames that are not IP
    FRAGMENT = "fragment"  # fragments, IPv6 extension headers
    PRIVATE_DROPPED = "private_dropped"  # to a blocked address, where TCP is not proxied
    HOST_DROPPED = "host_dropped"  # to an address of the gateway, other than DNS
    RATE_DROPPED = "rate_dropped"  # over the sandbox's bandwidth or rate of new connections


# Reasons that have a named counter in the ruleset.
KERNEL_REASONS = (
    Reason.SPOOFED, Reason.UDP_NOT_ALLOWED, Reason.PROTOCOL_DROPPED, Reason.FRAGMENT, Reason.PRIVATE_DROPPED,
    Reason.HOST_DROPPED, Reason.RATE_DROPPED,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Denial:
    """Denied attempt of a guest, repeated `count` times; `host` is the requested name or address: untrusted text."""

    reason: Reason
    host: str
    port: int
    protocol: str
    count: int
