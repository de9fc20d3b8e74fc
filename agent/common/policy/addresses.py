"""Which addresses no sandbox may reach unless the operator says so: everything that is not the public internet.

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
# Global unicast is 2000::/3 alone; all else is blocked, and these parts of it, too.
GLOBAL_IPV6 = IPv6Network("2000::/3")
BLOCKED_IPV6: tuple[IPv6Network, ...] = tuple(
    IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)
NAT64 = IPv6Network("64:ff9b::/96")


def embedded_ipv4(address: IPv6Address) -> IPv4Address | None:
    """Returns the IPv4 address that a translator would make of this one (mapped or NAT64); None if there is none."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return None


def is_blocked(address: Address, permitted: Iterable[IpRange] = ()) -> bool:
    """Whether no sandbox may reach `address`; `permitted` are the ranges that the operator lets through."""
    for network in permitted:
        if address.version == network.version and address in network:
            return False
    if isinstance(address, IPv4Address):
        return any(address in network for network in BLOCKED_IPV4)
    if address.ipv4_mapped is not None:
        return True  # it never comes over a wire; sockets would make IPv4 of it
    if address in NAT64:
        return is_blocked(IPv4Address(int(address) & 0xFFFF_FFFF), permitted)
    return address not in GLOBAL_IPV6 or any(address in network for network in BLOCKED_IPV6)


def parse_server(text: str, default_port: int = 53) -> tuple[str, int]:
    """Returns address and port of "192.0.2.1", "192.0.2.1:53", "2001:db8::1" or "[2001:db8::1]:53".

    :raises ValueError:
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
    """Returns the network of "10.0.0.0/8", "fd00::/8" or of one address. :raises ValueError:"""
    return ip_network(text.strip().removeprefix("[").removesuffix("]"), strict=False)
