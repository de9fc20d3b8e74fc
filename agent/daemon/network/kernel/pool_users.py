"""Find foreign users of the address pools (egress.pool_ipv4, egress.pool_ipv6) among the uplink's addresses and routes.

Uses pyroute2, which takes 0.5 s to load and 17 MB: for commands. The daemon encodes its few messages itself
(`agent.daemon.network.kernel.rtnetlink`). A separate thread enters the uplink namespace, since pyroute2 would fork.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_interface, ip_network
from typing import Any

from agent.common.errors import HostError
from agent.daemon.network.kernel import namespaces, uplink
from agent.daemon.network.kernel.links import OUTER_PREFIX
from agent.daemon.network.kernel.pool import AddressPool

_LOCAL_TABLE = 255  # one route for each address, which is listed itself (rtnetlink(7), RT_TABLE_LOCAL)


def find(namespace: str, pool: AddressPool) -> list[str]:
    """Return a description of each address and route in the pool's ranges that is not a sandbox's.

    :param namespace: name of the uplink's namespace; "" for the caller's own.
    :raises HostError: the namespace does not exist, or cannot be entered or read.
    """
    with ThreadPoolExecutor(1) as thread:  # ends with this block; the calling thread keeps its namespace
        return thread.submit(_find_inside, namespace, (pool.ipv4, pool.ipv6)).result()


def _find_inside(namespace: str, ranges: tuple[IPv4Network, IPv6Network]) -> list[str]:
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        if namespace:
            fd = uplink.open_namespace(namespace)
            try:
                namespaces.enter(fd)
            finally:
                os.close(fd)
        with IPRoute() as netlink:
            names = {link["index"]: str(link.get("ifname")) for link in netlink.get_links()}
            ours = {index for index, name in names.items() if name.startswith(OUTER_PREFIX)}
            found = [*_addresses(netlink, ours, ranges), *_routes(netlink, ours, ranges)]
    except (OSError, NetlinkError) as error:
        raise HostError(f"cannot read the uplink's addresses and routes: {error}", reason="NETNS_FAILED") from error
    return [f"{what} of {names.get(index, 'no link')}" for what, index in found]


def _addresses(netlink: Any, ours: set[int], ranges: tuple[Any, ...]) -> Iterator[tuple[str, int]]:
    for message in netlink.get_addr():
        text = message.get("local") or message.get("address")
        if message["index"] not in ours and any(ip_address(text) in one for one in ranges):
            yield f"address {ip_interface((text, message['prefixlen']))}", message["index"]


def _routes(netlink: Any, ours: set[int], ranges: tuple[Any, ...]) -> Iterator[tuple[str, int]]:
    """Yield the routes into the ranges; a wider route is harmless, since the sandboxes' more specific ones win."""
    for message in netlink.get_routes():
        text, index = message.get("dst"), message.get("oif") or 0
        if not text or index in ours or message.get("table") == _LOCAL_TABLE:
            continue
        target = ip_network((text, message["dst_len"]))
        if any(target.version == one.version and target.subnet_of(one) for one in ranges):
            yield f"route to {target}", index
