"""The benchmarks' own parts: declared figures, the statistics of a comparison, and the command line."""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.tools.bench.benches import NAMES, declared
from tests.tools.bench.figures import Better, Figure, Range, faults
from tests.tools.bench.ranks import LEAST_SAMPLES, p_value
from tests.tools.bench.verdict import Compared, sentence
from tests.tools.bench.verdict import compare as compare_figures

ROOT = Path(__file__).parents[3]
TIME = Figure("ready_s", "s", "a time")
RATE = Figure("rate", "MiB/s", "a rate", Better.HIGHER)
LOST = Figure("lost", "sandboxes", "a count", range=Range.COUNT)
ADDED = Figure("added_ms", "ms", "a difference", range=Range.DIFFERENCE)


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_figures_says_what_each_figure_is(name: str) -> None:
    text = (ROOT / "docs/performance.md").read_text()
    assert [figure.name for figure in declared([name]) if f"`{figure.name}`" not in text] == []


def test_no_name_is_declared_twice() -> None:
    names = [figure.name for figure in declared(NAMES)]
    assert sorted(names) == sorted(set(names))


def test_figures_of_a_run_are_checked() -> None:
    figures = (TIME, LOST, ADDED)
    assert faults(figures, {"ready_s": 0.1, "lost": 0, "added_ms": -1.5}) == []
    assert faults(figures, {"lost": 0, "added_ms": 1.0}) == ["ready_s is missing"]
    assert faults(figures, {"ready_s": 1, "lost": 0, "added_ms": 1, "more": 1}) == ["more is not declared"]
    for wrong in ({"ready_s": 0.0}, {"ready_s": math.nan}, {"lost": -1}, {"added_ms": math.inf}):
        (fault,) = faults(figures, {"ready_s": 1.0, "lost": 0, "added_ms": 1.0} | wrong)
        assert fault.startswith(next(iter(wrong)))


# -- statistics --------------------------------------------------------------------------------------------------------


def _by_enumeration(first: Sequence[float], second: Sequence[float]) -> float:
    """The p-value by its definition: all ways to deal the values out."""
    pooled = [*first, *second]
    ranks = [sum(one < value for one in pooled) + (sum(one == value for one in pooled) + 1) / 2 for value in pooled]
    mean = len(first) * (len(pooled) + 1) / 2
    seen = abs(sum(ranks[: len(first)]) - mean)
    sums = [sum(chosen) for chosen in itertools.combinations(ranks, len(first))]
    return sum(abs(total - mean) >= seen for total in sums) / len(sums)


def test_p_is_that_of_the_tables() -> None:
    # Complete separation is two of all C(n + m, n) ways.
    assert p_value([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)
    assert p_value([5, 6, 7, 8, 9], [1, 2, 3, 4, 0]) == pytest.approx(2 / 252)
    # U = 3 with five of each: 0.056, as in tables of the exact distribution (14 / 252).
    assert p_value([1, 2, 3, 4, 8], [5, 6, 7, 9, 10]) == pytest.approx(14 / 252)
    assert p_value([1.0], [1.0]) == 1.0
    assert p_value([3] * 10, [3] * 10) == 1.0


def test_p_is_exact_with_ties_and_other_sizes() -> None:
    dice = random.Random(5)
    for _ in range(60):
        first = [dice.randrange(5) for _ in range(dice.randrange(1, 6))]
        second = [dice.randrange(6) for _ in range(dice.randrange(1, 6))]
        assert p_value(first, second) == pytest.approx(_by_enumeration(first, second))
        assert p_value(first, second) == pytest.approx(p_value(second, first))


def test_fewer_samples_than_the_least_never_decide() -> None:
    few = range(LEAST_SAMPLES - 1)
    assert p_value([*few], [one + 100 for one in few]) > 0.05
    many = range(LEAST_SAMPLES)
    assert p_value([*many], [one + 100 for one in many]) < 0.05
    with pytest.raises(ValueError, match="needs a value"):
        p_value([], [1.0])


def _compared(figure: Figure, old: Sequence[float], new: Sequence[float]) -> Compared:
    ((one,), lacking) = compare_figures({"x": [figure]}, {("x", figure.name): old}, {("x", figure.name): new})
    assert lacking == []
    return one


def test_worse_is_up_or_down_as_the_figure_says() -> None:
    low, high = [10.0, 10.1, 10.2, 10.3, 10.4], [12.0, 12.1, 12.2, 12.3, 12.4]
    slower, faster = _compared(TIME, low, high), _compared(TIME, high, low)
    assert slower.ratio == pytest.approx(12.2 / 10.2)
    assert (slower.word(), slower.is_worse(1.05), slower.is_worse(1.25)) == ("worse", True, False)
    assert (faster.word(), faster.is_worse(1.0)) == ("better", False)
    assert _compared(RATE, low, high).word() == "better"
    assert _compared(RATE, high, low).worsening == pytest.approx(12.2 / 10.2)
    reference = Figure("link", "ratio", "a reference", Better.NEITHER)
    assert (_compared(reference, low, high).word(), _compared(reference, high, low).word()) == ("same", "same")


def test_what_chance_can_do_is_no_verdict() -> None:
    noisy = _compared(TIME, [10.0, 14.0, 11.0, 18.0], [12.0, 15.0, 11.5, 19.0])
    assert noisy.ratio is not None
    assert noisy.ratio > 1.05
    assert (noisy.word(), noisy.is_worse(1.05)) == ("same", False)


def test_zeros_and_negative_differences() -> None:
    assert _compared(LOST, [0] * 5, [0] * 5).ratio == 1.0
    lost = _compared(LOST, [0] * 5, [1] * 5)
    assert (lost.worsening, lost.is_worse(1.05)) == (math.inf, True)
    assert _compared(LOST, [1] * 5, [0] * 5).word() == "better"
    kept = Figure("adopted", "sandboxes", "a count", Better.HIGHER, Range.COUNT)
    assert _compared(kept, [50] * 5, [0] * 5).is_worse(1.05)
    assert _compared(ADDED, [-1.0] * 5, [2.0] * 5).ratio is None
    assert not _compared(ADDED, [-1.0] * 5, [2.0] * 5).is_worse(1.0)


def test_the_verdict_names_what_is_worse() -> None:
    worse = _compared(TIME, [1.0, 1.1, 1.2, 1.3], [2.0, 2.1, 2.2, 2.3])
    same = _compared(RATE, [1.0, 1.1, 1.2, 1.3], [1.0, 1.1, 1.2, 1.3])
    assert sentence([same], 1.05) == "verdict: no figure is worse by more than 1.05 with p < 0.05"
    said = sentence([same, worse], 1.05)
    assert said == "verdict: worse by more than 1.05 with p < 0.05: x ready_s 1.870 times (p 0.0286)"


def test_figures_of_one_tree_alone_are_named() -> None:
    old, new = {("x", "ready_s"): [1.0], ("x", "gone"): [1.0]}, {("x", "ready_s"): [1.0], ("x", "rate"): [1.0]}
    compared, lacking = compare_figures({"x": [TIME, RATE]}, old, new)
    assert [one.figure.name for one in compared] == ["ready_s"]
    assert lacking == ["x rate", "x gone"]


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["exec", "--max-ratio", "1.05"],
        ["exec", "--rounds-per-turn", "2"],
        ["exec", "--compare", "HEAD", "--small"],
        ["exec", "--compare", "HEAD", "--max-ratio", "0.9"],
        ["exec", "--compare", "HEAD", "--max-ratio", "nan"],
        ["exec", "--compare", "HEAD", "--max-ratio", "1.05", "--rounds", "3"],
        ["exec", "--compare", "HEAD", "--rounds-per-turn", "0"],
        ["exec", "--rounds", "0"],
        ["exec", "--compare"],
    ],
)
def test_options_that_do_not_go_together(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.tools.bench.__main__ import main

    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err
