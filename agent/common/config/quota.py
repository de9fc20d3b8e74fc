"""Quotas: limits on the sum of a tenant's sandboxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agent.common.model import SandboxSpec
from agent.common.quantities import Bytes, converted

_LIMITS = {"sandboxes": ("sandboxes", int), "cpus": ("cpus", int), "memory": ("memory_bytes", Bytes)}


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits on the sum of a tenant's sandboxes; None: no limit."""

    sandboxes: int | None = None
    cpus: int | None = None
    memory_bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Quota:
        """Return the quota of a text such as "sandboxes=10, cpus=16, memory=8GiB".

        :raises ValueError: a part has another form.
        """
        values: dict[str, int] = {}
        for word in filter(None, (word.strip() for word in text.split(","))):
            key, _, value = (part.strip() for part in word.partition("="))
            try:
                name, kind = _LIMITS[key]
                values[name] = converted(kind, value)
            except (KeyError, ValueError):
                raise ValueError(f"{word!r} is not a limit; write sandboxes=10, cpus=16, memory=8GiB") from None
        return cls(**values)

    def lacking(self, specs: Sequence[SandboxSpec]) -> list[str]:
        """Return each limit that these sandboxes together exceed, as text such as "cpus: 18 of 16"."""
        sums = (
            ("sandboxes", len(specs), self.sandboxes),
            ("cpus", sum(spec.vcpu_count for spec in specs), self.cpus),
            ("memory_bytes", sum(spec.memory_bytes for spec in specs), self.memory_bytes),
        )
        return [f"{name}: {total} of {limit}" for name, total, limit in sums if limit is not None and total > limit]
