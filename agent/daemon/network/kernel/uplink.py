"""The uplink namespace's part: NAT for sandboxes that are routed out, and nothing from them to the host or each other.

One table, there as long as a sandbox needs it.
"""

from __future__ import annotations

import os
from pathlib import Path

from agent.common.errors import HostError
from agent.daemon.network.kernel import links, nft
from agent.daemon.network.kernel.pool import Pool

TABLE = "inet sandboxd"
_LINKS = '"sbx*"'


def render(pool: Pool) -> str:
    """Returns the table for nft(8); it replaces the one that is there."""
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


def set_up(pool: Pool) -> None:
    """Makes the table and has the namespace, where the caller is, pass packets on. :raises HostError:"""
    nft.run(render(pool))
    try:
        _keep_advertisements()
        links.set_forwarding()
    except OSError as error:
        raise HostError(f"cannot turn forwarding on in the uplink namespace: {error}", reason="NETNS_FAILED") from error


def _keep_advertisements() -> None:
    """A host that learns its routes from router advertisements must go on doing so when it forwards, too.

    With forwarding, accept_ra = 1 means no and 2 means yes (the kernel's ip-sysctl.rst).
    """
    for setting in Path("/proc/sys/net/ipv6/conf").glob("*/accept_ra"):
        if setting.read_text().strip() == "1":
            setting.write_text("2")


def tear_down() -> None:
    """Removes the table. Idempotent. :raises HostError:"""
    nft.run(f"table {TABLE}\ndelete table {TABLE}\n")


def open_own(name: str) -> int:
    """Returns a descriptor of the namespace: of this name (ip-netns(8)), or the caller's. :raises HostError:"""
    path = Path("/run/netns") / name if name else Path("/proc/self/ns/net")
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"egress.uplink: there is no network namespace {name}: {error.strerror}; `ip netns add {name}` makes one",
            reason="NETNS_FAILED",
        ) from error
