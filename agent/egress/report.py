"""Denials since the last report to the agent: counts of all of them, details of a limited number."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from agent.common.policy.reasons import Reason

MAX_DENIALS = 256  # with details per report; further ones are only counted


@dataclass(slots=True)
class Reporter:
    """Denials collected until the next report. All sandboxes share one reporter."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    denials: dict[tuple[str, str, str, int, str], int] = field(default_factory=dict)

    def deny(self, sandbox_id: str, reason: Reason, host: str, port: int, protocol: str) -> None:
        """Count one denial. `host` is text from the guest: it is cut to 255 characters, without control characters."""
        self.counts[sandbox_id, reason.value] += 1
        clean = "".join(letter if letter.isprintable() else "?" for letter in host[:255])
        key = (sandbox_id, reason.value, clean, port, protocol)
        if key in self.denials or len(self.denials) < MAX_DENIALS:
            self.denials[key] = self.denials.get(key, 0) + 1

    def take(self) -> dict[str, Any] | None:
        """Return the report message and start the next one; None without denials."""
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
