"""DNS answers given to a sandbox: the only addresses at which their names may be connected to."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from agent.common.policy.addresses import Address

MAX_PINS = 4096
# Clients use addresses beyond their TTL: connection pools, runtimes with own caches, /etc/hosts.
MIN_HOLD_S = 3600.0


class DnsPins:
    """Expiring pairs of (normalised) name and address. Beyond `max_pins`, the least recently pinned is dropped."""

    def __init__(
        self, max_pins: int = MAX_PINS, min_hold_s: float = MIN_HOLD_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_pins = max_pins
        self._min_hold_s = min_hold_s
        self._clock = clock
        self._until: OrderedDict[tuple[str, Address], float] = OrderedDict()  # in the order of the last pin
        self._by_address: dict[Address, dict[str, None]] = {}
        self._by_name: dict[str, dict[Address, None]] = {}

    def __len__(self) -> int:
        """Return the number of pairs, expired ones included."""
        return len(self._until)

    def pin(self, name: str, addresses: Iterable[Address], ttl_s: float) -> None:
        """Add an answer that is valid for `ttl_s` seconds, or for the minimum time if that is longer."""
        until = self._clock() + max(ttl_s, self._min_hold_s)
        for address in addresses:
            key = (name, address)
            self._until[key] = until
            self._until.move_to_end(key)
            names = self._by_address.setdefault(address, {})
            names.pop(name, None)  # inserted anew as the latest
            names[name] = None
            known = self._by_name.setdefault(name, {})
            known.pop(address, None)
            known[address] = None
        while len(self._until) > self._max_pins:
            self._drop(*next(iter(self._until)))

    def names(self, address: Address) -> tuple[str, ...]:
        """Return the names that were answered with this address, the latest first."""
        return tuple(name for name in reversed(self._by_address.get(address, {})) if self._holds(name, address))

    def addresses(self, name: str) -> tuple[Address, ...]:
        """Return the addresses that the name was answered with, the latest first."""
        return tuple(address for address in reversed(self._by_name.get(name, {})) if self._holds(name, address))

    def has(self, name: str, address: Address) -> bool:
        """Return whether the name was answered with this address, and that has not expired."""
        return self._holds(name, address)

    def _holds(self, name: str, address: Address) -> bool:
        return self._until.get((name, address), 0.0) > self._clock()

    def _drop(self, name: str, address: Address) -> None:
        del self._until[name, address]
        names, addresses = self._by_address[address], self._by_name[name]
        del names[name], addresses[address]
        if not names:
            del self._by_address[address]
        if not addresses:
            del self._by_name[name]
