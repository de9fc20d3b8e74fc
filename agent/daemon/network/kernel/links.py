"""Routes and links of sandboxes' namespaces. All of it runs in a thread that is in one of them."""

from __future__ import annotations

import socket
from pathlib import Path

from agent.daemon.network.kernel import rtnetlink
from agent.daemon.network.kernel.pool import Pair
from agent.daemon.network.kernel.ruleset import MARK, ROUTE_TABLE, UPLINK

PREFIX4, PREFIX6 = 31, 127
OUTER_PREFIX = "sbx"  # of the names of links in the uplink namespace


def outer_name(slot: int) -> str:
    """Returns the name of a slot's link in the uplink namespace."""
    return f"{OUTER_PREFIX}{slot}"


def _families() -> list[int]:
    has_ipv6 = Path("/proc/sys/net/ipv6").exists()
    return [socket.AF_INET, socket.AF_INET6] if has_ipv6 else [socket.AF_INET]


def route_marked() -> None:
    """Has packets with the proxy's mark delivered here, whatever their destination (TPROXY needs it). Idempotent."""
    requests = []
    for family in _families():
        requests.append(rtnetlink.mark_rule(family, MARK, ROUTE_TABLE))
        requests.append(rtnetlink.local_default_route(family, ROUTE_TABLE))
    rtnetlink.send(requests)


def set_forwarding() -> None:
    """Has the namespace pass packets on."""
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    if socket.AF_INET6 in _families():
        Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")


def make_uplink(slot: int, pair: Pair, outer_fd: int) -> None:
    """Makes the link to the namespace `outer_fd` and gives it the sandbox's addresses. :raises OSError:

    The other end has its name and no address yet.
    """
    rtnetlink.send([rtnetlink.new_veth(UPLINK, outer_name(slot), outer_fd)])
    _open(UPLINK, [(pair.inner4, PREFIX4), (pair.inner6, PREFIX6)])


def finish_uplink(pair: Pair) -> None:
    """Adds the routes out; the other end must be up, or the kernel refuses them. :raises OSError:"""
    index = socket.if_nametoindex(UPLINK)
    gateways = (pair.outer4, pair.outer6)[: len(_families())]
    rtnetlink.send(rtnetlink.default_route(index, gateway) for gateway in gateways)
    set_forwarding()


def open_outer(slot: int, pair: Pair) -> None:
    """Gives the link its end in the uplink namespace, where the caller is. :raises OSError:"""
    _open(outer_name(slot), [(pair.outer4, PREFIX4), (pair.outer6, PREFIX6)])


def _open(name: str, addresses: list[tuple[rtnetlink.Address, int]]) -> None:
    index = socket.if_nametoindex(name)
    requests = [rtnetlink.add_address(index, address, prefix) for address, prefix in addresses[: len(_families())]]
    rtnetlink.send([*requests, rtnetlink.set_up(index)])


def remove_uplink() -> None:
    """Removes the link, both ends. Idempotent. :raises OSError:"""
    rtnetlink.send([rtnetlink.remove_link(UPLINK)])


def remove_outer(slot: int) -> None:
    """Removes a slot's link by its end in the uplink namespace, where the caller is. Idempotent. :raises OSError:"""
    rtnetlink.send([rtnetlink.remove_link(outer_name(slot))])
