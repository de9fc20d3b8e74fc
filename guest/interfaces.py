"""Configure network interfaces by ioctls: netdevice(7), ipv6(7), SIOCADDRT of linux/sockios.h."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

_SIOCADDRT, _SIOCSIFFLAGS, _SIOCGIFFLAGS = 0x890B, 0x8914, 0x8913
_SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCGIFINDEX = 0x8916, 0x891C, 0x8933
_IFF_UP = 1
_RTF_UP, _RTF_GATEWAY = 1, 2
_RTF_DEFAULT_IN6 = _RTF_UP | _RTF_GATEWAY


def bring_up(interface: str) -> None:
    """Set an interface up.

    :raises OSError: it does not exist.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", interface.encode(), 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", interface.encode(), flags | _IFF_UP))


def first_nic() -> str:
    """Return the name of the first network card (an interface with a device, so not loopback), or ""."""
    for name in sorted(os.listdir("/sys/class/net")):
        if os.path.exists(f"/sys/class/net/{name}/device"):
            return name
    return ""


def _sockaddr_in(address: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


def configure_ipv4(interface: str, cidr: str, gateway: str) -> None:
    """Set an IPv4 address, its mask and the default route.

    :raises OSError: the kernel refused one, or an address is malformed.
    :raises ValueError: the prefix length is malformed.
    """
    address, _, prefix = cidr.partition("/")
    mask = socket.inet_ntoa(struct.pack(">I", 0xFFFF_FFFF << (32 - int(prefix)) & 0xFFFF_FFFF))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for request, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, mask)):
            fcntl.ioctl(sock, request, struct.pack("16s16s8x", interface.encode(), _sockaddr_in(value)))
        bring_up(interface)
        if gateway:
            any_address = _sockaddr_in("0.0.0.0")  # noqa: S104  the default route, not a listener
            # struct rtentry: pad, destination, gateway, mask, flags, and fields that stay zero (120 bytes on 64 bit)
            route = struct.pack(
                "@L16s16s16sH", 0, any_address, _sockaddr_in(gateway), any_address, _RTF_UP | _RTF_GATEWAY
            )
            fcntl.ioctl(sock, _SIOCADDRT, route.ljust(120, b"\0"))


def configure_ipv6(interface: str, cidr: str, gateway: str) -> None:
    """Add an IPv6 address and the default route.

    :raises OSError: the kernel refused one, or an address is malformed.
    :raises ValueError: the prefix length is malformed.
    """
    address, _, prefix = cidr.partition("/")
    # Duplicate address detection would delay the address by a second; the link has no other guest.
    with open(f"/proc/sys/net/ipv6/conf/{interface}/accept_dad", "w") as setting:
        setting.write("0")
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        name = struct.pack("16s16x8x", interface.encode())
        index = struct.unpack("16si20x", fcntl.ioctl(sock, _SIOCGIFINDEX, name))[1]
        fcntl.ioctl(
            sock, _SIOCSIFADDR, struct.pack("=16sIi", socket.inet_pton(socket.AF_INET6, address), int(prefix), index)
        )
        if gateway:
            # struct in6_rtmsg of linux/ipv6_route.h
            route = struct.pack(
                "@16s16s16sIHHILIi", bytes(16), bytes(16), socket.inet_pton(socket.AF_INET6, gateway),
                0, 0, 0, 1024, 0, _RTF_DEFAULT_IN6, index,
            )  # fmt: skip
            fcntl.ioctl(sock, _SIOCADDRT, route)
