"""Says which of two trees is the better one, figure by figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tests.tools.bench.figures import Better, Figure, Range
from tests.tools.bench.ranks import p_value

TEST = "Mann-Whitney U, two-sided, exact"
SIGNIFICANT_P = 0.05


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of both trees, a value for each round."""

    bench: str
    figure: Figure
    old: Sequence[float]
    new: Sequence[float]
    p: float

    @property
    def ratio(self) -> float | None:
        """The new median over the old one; None where a median is not positive, and a ratio would say nothing."""
        old, new = statistics.median(self.old), statistics.median(self.new)
        if old > 0 and new > 0:
            return new / old
        if self.figure.range is not Range.COUNT:
            return None
        if old == new:
            return 1.0
        return 0.0 if new == 0 else math.inf

    @property
    def worsening(self) -> float | None:
        """How many times worse the new tree is; below 1 if it is better, None where it cannot be said."""
        ratio = self.ratio
        if ratio is None or self.figure.better is Better.NEITHER:
            return None
        if self.figure.better is Better.LOWER:
            return ratio
        return math.inf if ratio == 0 else 1 / ratio

    def is_worse(self, max_ratio: float) -> bool:
        """Return whether the new tree is worse by more than `max_ratio`, and not by chance."""
        return self.worsening is not None and self.worsening > max_ratio and self.p < SIGNIFICANT_P

    def is_better(self) -> bool:
        """Return whether the new tree is better, and not by chance."""
        return self.worsening is not None and self.worsening < 1 and self.p < SIGNIFICANT_P

    def word(self) -> str:
        """Return "worse", "better", or "same" where the difference may be chance."""
        return "worse" if self.is_worse(1.0) else "better" if self.is_better() else "same"


Values = Mapping[tuple[str, str], Sequence[float]]


def compare(declared: Mapping[str, Iterable[Figure]], old: Values, new: Values) -> tuple[list[Compared], list[str]]:
    """Return the comparison of each declared figure that both trees have, and the names of those that one lacks.

    :param declared: figures by benchmark, as the new tree declares them.
    """
    compared, lacking = [], []
    for bench, figures in declared.items():
        for figure in figures:
            key = (bench, figure.name)
            if key in old and key in new:
                p = p_value(old[key], new[key])
                compared.append(Compared(bench, figure, old[key], new[key], p))
            else:
                lacking.append(f"{bench} {figure.name}")
    known = {(bench, figure.name) for bench, figures in declared.items() for figure in figures}
    lacking += [f"{bench} {name}" for bench, name in sorted({*old, *new} - known)]
    return compared, lacking


def sentence(compared: Iterable[Compared], max_ratio: float) -> str:
    """Return the verdict on all figures, in one line."""
    worse = [one for one in compared if one.is_worse(max_ratio)]
    limit = "" if max_ratio == 1.0 else f" by more than {max_ratio:g}"
    if not worse:
        return f"verdict: no figure is worse{limit} with p < {SIGNIFICANT_P:g}"
    each = ", ".join(f"{one.bench} {one.figure.name} {one.worsening:.3f} times (p {one.p:.4f})" for one in worse)
    return f"verdict: worse{limit} with p < {SIGNIFICANT_P:g}: {each}"
