"""Whom VMMs run as: each a user of its own, who owns nothing else on the host."""

from __future__ import annotations

import os

from agent.common.errors import ResourceExhausted

_COUNT = 1 << 16


class Uids:
    """A range of users, which must be nobody else's. :param base: the first; 0: VMMs run as the agent's own user."""

    def __init__(self, base: int) -> None:
        self._base = base if os.geteuid() == 0 else 0
        self._taken: set[int] = set()
        self._next = 0

    def take(self) -> int | None:
        """Returns a user who is nobody's; None where VMMs run as the agent. :raises ResourceExhausted: none is left."""
        if not self._base:
            return None
        for step in range(_COUNT):
            uid = self._base + (self._next + step) % _COUNT
            if uid not in self._taken:
                self._next = uid + 1 - self._base  # so that one that was given back rests for as long as can be
                self._taken.add(uid)
                return uid
        raise ResourceExhausted(f"all {_COUNT} users from vmm.uid_base on are taken", reason="NO_UID")

    def reserve(self, uid: int | None) -> None:
        """Notes one that an earlier agent took."""
        if uid is not None:
            self._taken.add(uid)

    def give_back(self, uid: int | None) -> None:
        """Frees one whose files and processes are gone. Idempotent."""
        self._taken.discard(uid or 0)
