"""The Mann-Whitney U test: do two samples come from one distribution? Ranks, so that one slow round decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

LEAST_SAMPLES = 4  # of each side: with three of each, no outcome has a p-value below 0.05 (the lowest is 2 / 20)


def p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the two-sided p-value, exact also with ties: the share of all ways to deal the values out in which the
    first sample's rank sum is at least as far from its mean as the one that was seen.

    :raises ValueError: a sample is empty.
    """
    if not first or not second:
        raise ValueError("each sample needs a value")
    pooled = [*first, *second]
    ranks = [_doubled_rank(value, pooled) for value in pooled]
    ways = _rank_sums(ranks, len(first))
    # Doubled ranks are 1 to 2 N + 1 apart from ties, so the mean of a sum is a whole number, too.
    mean = len(first) * (len(pooled) + 1)
    seen = abs(sum(ranks[: len(first)]) - mean)
    extreme = sum(count for total, count in enumerate(ways) if abs(total - mean) >= seen)
    return extreme / comb(len(pooled), len(first))


def _doubled_rank(value: float, pooled: Sequence[float]) -> int:
    """Return twice the rank of a value; equal values share the mean of their ranks, which can end in a half."""
    less, equal = sum(one < value for one in pooled), sum(one == value for one in pooled)
    return 2 * less + equal + 1


def _rank_sums(ranks: Sequence[int], size: int) -> list[int]:
    """Return, for each total, in how many ways `size` of the ranks have it as their sum."""
    total = sum(ranks)
    ways = [[0] * (total + 1) for _ in range(size + 1)]
    ways[0][0] = 1
    for rank in ranks:
        for taken in range(size, 0, -1):  # downwards, so that a rank is taken once
            with_it, without = ways[taken], ways[taken - 1]
            for before in range(total - rank + 1):
                if without[before]:
                    with_it[before + rank] += without[before]
    return ways[size]
