"""Links and routes of sandboxes: veth pairs to the uplink, TPROXY routing. Runs in threads in the right namespace."""

from __future__ import annotations

import socket
from pathlib import Path

from agent.common.policy.addresses import Address
from agent.daemon.network.kernel import rtnetlink
from agent.daemon.network.kernel.pool import Pair
from agent.daemon.network.kernel.ruleset import MARK, ROUTE_TABLE, UPLINK

PREFIX4, PREFIX6 = 31, 127
OUTER_PREFIX = "sbx"  # name prefix of the links in the uplink namespace


def outer_name(slot: int) -> str:
    """Return the name of a slot's link in the uplink namespace."""
    return f"{OUTER_PREFIX}{slot}"


def _families() -> list[int]:
    has_ipv6 = Path("/proc/sys/net/ipv6").exists()
    return [socket.AF_INET, socket.AF_INET6] if has_ipv6 else [socket.AF_INET]


def route_marked() -> None:
    """Deliver packets with the proxy's mark locally, whatever their destination, as TPROXY needs it. Idempotent.

    :raises OSError: the kernel refused.
    """
    requests = []
    for family in _families():
        requests.append(rtnetlink.mark_rule(family, MARK, ROUTE_TABLE))
        requests.append(rtnetlink.local_default_route(family, ROUTE_TABLE))
    rtnetlink.send(requests)


def set_forwarding() -> None:
    """Enable IP forwarding in the namespace.

    :raises OSError: /proc/sys cannot be written.
    """
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    if socket.AF_INET6 in _families():
        Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")


def make_uplink(slot: int, pair: Pair, outer_fd: int) -> None:
    """Make the veth pair to the namespace `outer_fd` and set up the sandbox's end.

    The outer end has its name, but no address yet; see `open_outer`.

    :raises OSError: the kernel refused.
    """
    rtnetlink.send([rtnetlink.new_veth(UPLINK, outer_name(slot), outer_fd)])
    _open(UPLINK, [(pair.inner4, PREFIX4), (pair.inner6, PREFIX6)])


def finish_uplink(pair: Pair) -> None:
    """Add the default routes; the outer end must be up.

    :raises OSError: the kernel refused.
    """
    index = socket.if_nametoindex(UPLINK)
    gateways = (pair.outer4, pair.outer6)[: len(_families())]
    rtnetlink.send(rtnetlink.default_route(index, gateway) for gateway in gateways)
    set_forwarding()


def open_outer(slot: int, pair: Pair) -> None:
    """Set up the outer end of a slot's link; call it in the uplink namespace.

    :raises OSError: the kernel refused.
    """
    _open(outer_name(slot), [(pair.outer4, PREFIX4), (pair.outer6, PREFIX6)])


def _open(name: str, addresses: list[tuple[Address, int]]) -> None:
    index = socket.if_nametoindex(name)
    requests = [rtnetlink.add_address(index, address, prefix) for address, prefix in addresses[: len(_families())]]
    rtnetlink.send([*requests, rtnetlink.set_up(index)])


def remove_uplink() -> None:
    """Remove the sandbox's link, both ends. Idempotent.

    :raises OSError: the kernel refused.
    """
    rtnetlink.send([rtnetlink.remove_link(UPLINK)])


def remove_outer(slot: int) -> None:
    """Remove a slot's link, both ends; call it in the uplink namespace. Idempotent.

    :raises OSError: the kernel refused.
    """
    rtnetlink.send([rtnetlink.remove_link(outer_name(slot))])
