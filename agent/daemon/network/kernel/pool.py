"""Pool of point-to-point addresses between sandboxes and the uplink (RFC 3021 for IPv4, RFC 6164 for IPv6)."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from agent.common.errors import ResourceExhausted


@dataclass(frozen=True, slots=True)
class Pair:
    """Addresses of one slot; NAT translates the guest's address to the inner one.

    :param inner4: end in the sandbox's namespace; `outer4` is the end in the uplink namespace.
    """

    inner4: IPv4Address
    outer4: IPv4Address
    inner6: IPv6Address
    outer6: IPv6Address


class AddressPool:
    """Allocates slots, the lowest free one first.

    :param ipv4: range such as "100.64.0.0/10"; the smaller of both ranges limits the number of slots.
    """

    def __init__(self, ipv4: str, ipv6: str) -> None:
        self.ipv4 = IPv4Network(ipv4, strict=False)
        self.ipv6 = IPv6Network(ipv6, strict=False)
        self.size = min(self.ipv4.num_addresses, self.ipv6.num_addresses) // 2
        self._used: set[int] = set()
        self._free: list[int] = []
        self._next = 0

    def __len__(self) -> int:
        """Return the number of slots in use."""
        return len(self._used)

    def allocate(self) -> int:
        """Allocate a slot.

        :raises ResourceExhausted: all slots are in use.
        """
        while self._free:
            slot = heapq.heappop(self._free)
            if slot not in self._used:
                self._used.add(slot)
                return slot
        while self._next in self._used:
            self._next += 1
        if self._next >= self.size:
            raise ResourceExhausted(
                f"all {self.size} addresses of egress.pool_ipv4 and egress.pool_ipv6 are used; make the pools larger",
                reason="ADDRESSES_EXHAUSTED",
            )
        self._used.add(self._next)
        return self._next

    def reserve(self, slot: int) -> None:
        """Mark a slot as in use; for sandboxes of an earlier daemon."""
        self._used.add(slot)

    def release(self, slot: int) -> None:
        """Free a slot. Idempotent."""
        if slot in self._used:
            self._used.discard(slot)
            heapq.heappush(self._free, slot)

    def pair(self, slot: int) -> Pair:
        """Return the addresses of a slot."""
        base4, base6 = int(self.ipv4.network_address) + 2 * slot, int(self.ipv6.network_address) + 2 * slot
        return Pair(IPv4Address(base4 + 1), IPv4Address(base4), IPv6Address(base6 + 1), IPv6Address(base6))
