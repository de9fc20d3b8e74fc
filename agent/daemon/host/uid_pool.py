"""Pool of dedicated host UIDs, one for each VMM."""

from __future__ import annotations

import os

from agent.common.errors import ResourceExhausted

_COUNT = 1 << 16


class UidPool:
    """A range of 65536 UIDs, owned by nothing else on the host.

    :param base: the first UID; 0: VMMs run as the agent's own user, as they do under an agent that is not root.
    """

    def __init__(self, base: int) -> None:
        self._base = base if os.geteuid() == 0 else 0
        self._reserved: set[int] = set()
        self._next = 0

    def reserve(self) -> int | None:
        """Return a UID that no VMM has; None where VMMs run as the agent.

        :raises ResourceExhausted: all UIDs are reserved.
        """
        if not self._base:
            return None
        for step in range(_COUNT):
            uid = self._base + (self._next + step) % _COUNT
            if uid not in self._reserved:
                self._next = uid + 1 - self._base  # a released UID is reused as late as possible
                self._reserved.add(uid)
                return uid
        raise ResourceExhausted(f"all {_COUNT} users from vmm.uid_base on are taken", reason="NO_UID")

    def reserve_existing(self, uid: int | None) -> None:
        """Reserve a UID that an earlier agent gave to a VMM; None: nothing to do."""
        if uid is not None:
            self._reserved.add(uid)

    def release(self, uid: int | None) -> None:
        """Return a UID without files and processes to the pool. Idempotent; None: nothing to do."""
        self._reserved.discard(uid or 0)
