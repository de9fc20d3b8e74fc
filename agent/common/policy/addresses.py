"""Addresses that sandboxes may not reach unless the operator permits them: all but the public internet.

Sources: IANA's special-purpose address registries (RFC 6890), RFC 6052 for NAT64, RFC 3056 for 6to4, RFC 4380 for
Teredo.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
IpRange = IPv4Network | IPv6Network

BLOCKED_IPV4: tuple[IPv4Network, ...] = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4",
    )
)  # fmt: skip
# Global unicast is 2000::/3; everything else is blocked, and these parts of it as well.
GLOBAL_IPV6 = IPv6Network("2000::/3")
BLOCKED_IPV6: tuple[IPv6Network, ...] = tuple(
    IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)
NAT64 = IPv6Network("64:ff9b::/96")


def embedded_ipv4(address: IPv6Address) -> IPv4Address | None:
    """Return the IPv4 address inside a mapped or NAT64 address; None for any other address."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return None


def is_blocked(address: Address, permitted: Iterable[IpRange] = ()) -> bool:
    """Whether sandboxes may not reach `address`; addresses in the operator's `permitted` ranges are not blocked."""
    for network in permitted:
        if address.version == network.version and address in network:
            return False
    if isinstance(address, IPv4Address):
        return any(address in network for network in BLOCKED_IPV4)
    if address.ipv4_mapped is not None:
        return True  # never valid on the wire; a socket would connect to the IPv4 address
    if address in NAT64:
        return is_blocked(IPv4Address(int(address) & 0xFFFF_FFFF), permitted)
    return address not in GLOBAL_IPV6 or any(address in network for network in BLOCKED_IPV6)


def parse_server(text: str, default_port: int = 53) -> tuple[str, int]:
    """Parse "192.0.2.1", "192.0.2.1:53", "2001:db8::1" or "[2001:db8::1]:53" into address and port.

    :raises ValueError: address or port is malformed.
    """
    host, port = text.strip(), ""
    if host.startswith("["):
        host, _, port = host[1:].partition("]")
        port = port.removeprefix(":")
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
    if port and not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ValueError(f"{text[:80]!r} has no valid port")
    return str(ip_address(host)), int(port or default_port)


def parse_network(text: str) -> IpRange:
    """Parse a range such as "10.0.0.0/8" or "fd00::/8", or one address; host bits are ignored.

    :raises ValueError: the text is neither.
    """
    return ip_network(text.strip().removeprefix("[").removesuffix("]"), strict=False)
