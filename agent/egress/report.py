"""What the egress process tells the agent of denials: counts, all of them; details, as many as a reader can use."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from agent.common.policy.reasons import Reason

MAX_DENIALS = 256  # details between two reports; more are only counted


@dataclass(slots=True)
class Reporter:
    """Collects until the control link takes it."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    denials: dict[tuple[str, str, str, int, str], int] = field(default_factory=dict)

    def deny(self, sandbox_id: str, reason: Reason, host: str, port: int, protocol: str) -> None:
        """Counts one denial. `host` is what was asked for: hostile text, cut here to a name's length."""
        self.counts[sandbox_id, reason.value] += 1
        clean = "".join(letter if letter.isprintable() else "?" for letter in host[:255])
        key = (sandbox_id, reason.value, clean, port, protocol)
        if key in self.denials or len(self.denials) < MAX_DENIALS:
            self.denials[key] = self.denials.get(key, 0) + 1

    def take(self) -> dict[str, Any] | None:
        """Returns the report since the last one, as JSON values; None if there is nothing to say."""
        if not self.counts:
            return None
        report = {
            "event": "report",
            "counts": [[sandbox_id, reason, count] for (sandbox_id, reason), count in self.counts.items()],
            "denials": [[*key, count] for key, count in self.denials.items()],
        }
        self.counts.clear()
        self.denials.clear()
        return report
