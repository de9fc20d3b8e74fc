"""Why something was not let through: the words of counters, events and answers. Each is one fact; none is a guess."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """A denial. `by` the egress process unless the comment says that the kernel's rules count it."""

    # Names and addresses.
    HOST_NOT_ALLOWED = "host_not_allowed"  # no rule has this name
    PORT_NOT_ALLOWED = "port_not_allowed"  # a rule has the name or address, with another port
    ADDRESS_NOT_ALLOWED = "address_not_allowed"  # an address that no rule lists and no allowed name was answered with
    ADDRESS_MISMATCH = "address_mismatch"  # an allowed name was asked for at an address that is not that name's
    DENIED_BY_OPERATOR = "denied_by_operator"
    BLOCKED_ADDRESS = "blocked_address"  # private, loopback, link-local, metadata, multicast, or the host's own
    # DNS.
    DNS_NOT_ALLOWED = "dns_not_allowed"  # a lookup of a name that no rule has
    DNS_BLOCKED_ANSWER = "dns_blocked_answer"  # an allowed name whose addresses are all blocked
    DNS_MALFORMED = "dns_malformed"
    # What is spoken on a connection.
    NO_SERVER_NAME = "no_server_name"  # TLS without SNI, or HTTP without Host
    HOST_MISMATCH = "host_mismatch"  # Host or :authority is not the name that the connection is for
    MALFORMED = "malformed"  # no valid TLS or HTTP; two readings of one message (request smuggling)
    PROTOCOL_NOT_ALLOWED = "protocol_not_allowed"  # neither TLS nor HTTP where only these can be checked
    TOO_LARGE = "too_large"  # a header section, TLS hello or DNS message over its limit
    TIMEOUT = "timeout"  # it did not say in time what it wants
    TOO_MANY_CONNECTIONS = "too_many_connections"
    UPSTREAM_UNVERIFIED = "upstream_unverified"  # the server's certificate is not the name's
    POLICY_CHANGED = "policy_changed"  # a connection that was allowed when it began
    SECRET_WITHHELD = "secret_withheld"  # noqa: S105  a placeholder went to a host that the secret is not for; it was left as it is
    # Counted by the kernel's rules.
    SPOOFED = "spoofed"  # a source address, MAC or ARP claim that is not this guest's
    UDP_NOT_ALLOWED = "udp_not_allowed"
    PROTOCOL_DROPPED = "protocol_dropped"  # neither TCP, UDP nor echo; VLAN tags; frames that are not IP
    FRAGMENT = "fragment"  # fragments and IPv6 extension headers
    PRIVATE_DROPPED = "private_dropped"  # towards blocked addresses, where TCP is not proxied
    HOST_DROPPED = "host_dropped"  # towards the gateway's own addresses, other than DNS
    RATE_DROPPED = "rate_dropped"  # over the sandbox's bandwidth or rate of new connections


# Those that the ruleset has a named counter for.
KERNEL_REASONS = (
    Reason.SPOOFED, Reason.UDP_NOT_ALLOWED, Reason.PROTOCOL_DROPPED, Reason.FRAGMENT, Reason.PRIVATE_DROPPED,
    Reason.HOST_DROPPED, Reason.RATE_DROPPED,
)  # fmt: skip
