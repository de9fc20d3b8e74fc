"""What a benchmark measures: each module declares its figures, for its JSON, comparisons and the documentation."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass


class Better(enum.Enum):
    """Which of two values of a figure is the better one."""

    LOWER = "lower"
    HIGHER = "higher"
    NEITHER = "neither"  # a reference for other figures: it depends on the host, and not on this code


class Range(enum.Enum):
    """Which values a figure can have, on any host."""

    POSITIVE = "positive"
    COUNT = "count"  # zero is one, too
    DIFFERENCE = "difference"  # of two measurements: noise can make it negative


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure. :param unit: "ms", "s", "MiB", "MiB/s", "sandboxes", or "ratio" of two values of one unit."""

    name: str
    unit: str
    meaning: str
    better: Better = Better.LOWER
    range: Range = Range.POSITIVE

    def takes(self, value: float) -> bool:
        """Return whether `value` is possible."""
        if not math.isfinite(value):
            return False
        return value > 0 or self.range is Range.DIFFERENCE or (value == 0 and self.range is Range.COUNT)


def faults(declared: tuple[Figure, ...], measured: Mapping[str, float]) -> list[str]:
    """Return what is wrong with the figures of a run, a phrase each: missing, undeclared, or an impossible value."""
    found = [f"{one.name} is missing" for one in declared if one.name not in measured]
    known = {one.name: one for one in declared}
    for name, value in measured.items():
        if name not in known:
            found.append(f"{name} is not declared")
        elif not known[name].takes(value):
            found.append(f"{name} is {value}, which is no {known[name].range.value} value")
    return found
