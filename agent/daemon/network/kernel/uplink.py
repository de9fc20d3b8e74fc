"""nftables table of the uplink namespace: NAT for routed sandboxes, no packets from them to the host or each other.

The table exists as long as a sandbox needs it.
"""

from __future__ import annotations

import os
from pathlib import Path

from agent.common.errors import HostError
from agent.daemon.network.kernel import links, nft
from agent.daemon.network.kernel.pool import AddressPool

TABLE = "inet sandboxd"
_LINKS = '"sbx*"'


def render(pool: AddressPool) -> str:
    """Return the commands that load the table in place of an existing one."""
    neighbours = "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert }"
    return f"""table {TABLE}
delete table {TABLE}
table {TABLE} {{
  chain input {{
    type filter hook input priority filter - 10; policy accept;
    iifname {_LINKS} {neighbours} accept
    iifname {_LINKS} counter drop
  }}
  chain forward {{
    type filter hook forward priority filter - 10; policy accept;
    iifname {_LINKS} oifname {_LINKS} counter drop
    iifname {_LINKS} ip saddr != {pool.ipv4} counter drop
    iifname {_LINKS} ip6 saddr != {pool.ipv6} counter drop
    oifname {_LINKS} ct state != {{ established, related }} counter drop
  }}
  chain nat {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {pool.ipv4} oifname != {_LINKS} masquerade
    ip6 saddr {pool.ipv6} oifname != {_LINKS} masquerade
  }}
}}
"""


def set_up(pool: AddressPool) -> None:
    """Load the table and enable forwarding; call it in the uplink namespace.

    :raises HostError: the kernel refused.
    """
    nft.run(render(pool))
    try:
        _keep_advertisements()
        links.set_forwarding()
    except OSError as error:
        raise HostError(f"cannot enable forwarding in the uplink namespace: {error}", reason="NETNS_FAILED") from error


def _keep_advertisements() -> None:
    """Keep accepting router advertisements on interfaces that accept them now, for a host that gets its routes so.

    With forwarding enabled, accept_ra = 1 means no and 2 means yes (the kernel's ip-sysctl.rst).
    """
    for setting in Path("/proc/sys/net/ipv6/conf").glob("*/accept_ra"):
        if setting.read_text().strip() == "1":
            setting.write_text("2")


def tear_down() -> None:
    """Remove the table; call it in the uplink namespace. Idempotent.

    :raises HostError: the kernel refused.
    """
    nft.run(f"table {TABLE}\ndelete table {TABLE}\n")


def open_namespace(name: str) -> int:
    """Return a descriptor of the uplink's namespace by its name (ip-netns(8)); "" for the caller's own.

    :raises HostError: the namespace does not exist.
    """
    path = Path("/run/netns") / name if name else Path("/proc/self/ns/net")
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"egress.uplink: no network namespace {name}: {error.strerror}; create it with `ip netns add {name}`",
            reason="NETNS_FAILED",
        ) from error
