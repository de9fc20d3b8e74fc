"""Who else uses the addresses of egress.pool_ipv4 and egress.pool_ipv6: a look at the uplink's addresses and routes.

Read with pyroute2, which takes half a second to load and 17 MB: for commands, not for the daemon, which makes its own
messages (`agent.daemon.network.kernel.rtnetlink`). Its functions for namespaces fork, so a thread of our own enters the
uplink.
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
from agent.daemon.network.kernel.pool import Pool

_LOCAL_TABLE = 255  # one route for each address, which is shown by itself (rtnetlink(7), RT_TABLE_LOCAL)


def find(namespace: str, pool: Pool) -> list[str]:
    """Return each address and route of the uplink in the pool's ranges, but for those of sandboxes.

    :param namespace: its name; "" is the caller's own namespace.
    :raises HostError: there is no such namespace, or it must not be entered or read.
    """
    with ThreadPoolExecutor(1) as thread:  # it ends here, and its namespace with it
        return thread.submit(_find_inside, namespace, (pool.ipv4, pool.ipv6)).result()


def _find_inside(namespace: str, ranges: tuple[IPv4Network, IPv6Network]) -> list[str]:
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        if namespace:
            fd = uplink.open_own(namespace)
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
    """Yield the routes into the ranges; wider ones do no harm, since those of sandboxes go before them."""
    for message in netlink.get_routes():
        text, index = message.get("dst"), message.get("oif") or 0
        if not text or index in ours or message.get("table") == _LOCAL_TABLE:
            continue
        target = ip_network((text, message["dst_len"]))
        if any(target.version == one.version and target.subnet_of(one) for one in ranges):
            yield f"route to {target}", index
