"""`just bench --compare REV NAME...`: another commit and this tree in turns, a ratio and a p-value for each figure.

Firecracker's tests compare two commits in the same way (tests/framework/ab_test.py there): figures of different days or
machines say little, those of neighbouring turns do.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from tests.tools.bench.benches import declared
from tests.tools.bench.command import CompareError
from tests.tools.bench.ranks import LEAST_SAMPLES
from tests.tools.bench.turns import Samples, Side, take_turns
from tests.tools.bench.verdict import SIGNIFICANT_P, TEST, Compared, compare, sentence
from tests.tools.bench.worktree import Tree, compile_code, ended_by_signals, here, prepare, worktree

REPOSITORY = Path(__file__).parents[3]
_ROUNDS = 10
_WORSE, _FAILED, _INTERRUPTED = 1, 2, 130  # exit statuses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a comparison."""
    group = parser.add_argument_group("comparison of two commits")
    group.add_argument("--compare", metavar="REV", help="run REV and this tree in turns; --rounds of each (10)")
    group.add_argument(
        "--max-ratio", type=float, metavar="RATIO",
        help=f"end with status 1 if a figure is worse by more than RATIO (1.05, say) with p < {SIGNIFICANT_P:g}",
    )  # fmt: skip
    group.add_argument(
        "--rounds-per-turn", type=int, default=1, metavar="N", help="the benchmark's own --rounds in each turn (1)"
    )


def check_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program if options do not go together."""
    if options.compare is None:
        if options.max_ratio is not None or options.rounds_per_turn != 1:
            parser.error("--max-ratio and --rounds-per-turn are for --compare")
        return
    if options.small or options.plot:
        parser.error("--compare measures in full size, and draws nothing")
    if options.rounds_per_turn < 1:
        parser.error("--rounds-per-turn must be at least 1")
    if options.max_ratio is not None:
        if not (math.isfinite(options.max_ratio) and options.max_ratio >= 1):
            parser.error("--max-ratio must be at least 1")
        if (options.rounds or _ROUNDS) < LEAST_SAMPLES:
            parser.error(f"--max-ratio needs --rounds {LEAST_SAMPLES} or more: fewer never have p < {SIGNIFICANT_P:g}")


def main(
    options: argparse.Namespace, repository: Path = REPOSITORY, make_ready: Callable[[Tree], None] = prepare
) -> int:
    """Compare, print, and return the exit status: 0, 1 for worse than --max-ratio, 2 if a side cannot be measured.

    :param make_ready: makes the worktree of the other commit runnable.
    """
    names = list(dict.fromkeys(options.names))
    rounds = options.rounds or _ROUNDS
    try:
        with ended_by_signals(), worktree(repository, options.compare) as other:
            this = here(repository)
            _say(f"making {other.commit} ready, to compare with {this.commit}")
            make_ready(other)
            compile_code(this)
            sides = [_side("old", other), _side("new", this)]
            samples = take_turns(sides, names, rounds, say=_say, per_turn=options.rounds_per_turn)
    except CompareError as error:
        _say(str(error))
        return _FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED
    figures = {name: declared([name]) for name in names}
    compared, lacking = compare(figures, samples.values["old"], samples.values["new"])
    max_ratio = options.max_ratio or 1.0
    facts = {"old": other.commit, "new": this.commit, "rounds": rounds, "test": TEST}
    if options.json:
        print(json.dumps(_object(facts, samples, compared, lacking, max_ratio), allow_nan=False))
    else:
        _print_tables(facts, compared, lacking, max_ratio)
    is_worse = options.max_ratio is not None and any(one.is_worse(max_ratio) for one in compared)
    return _WORSE if is_worse else 0


def _side(name: str, tree: Tree) -> Side:
    """Return how a tree is measured; its benchmarks were in tests/bench until 0.2.0."""
    module = "tests.tools.bench" if (tree.directory / "tests" / "tools" / "bench").is_dir() else "tests.bench"
    return Side(name, tree, (str(tree.python), "-m", module))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _object(
    facts: dict[str, Any], samples: Samples, compared: list[Compared], lacking: list[str], max_ratio: float
) -> dict[str, Any]:
    figures = [
        {
            "bench": one.bench, "figure": one.figure.name, "unit": one.figure.unit, "better": one.figure.better.value,
            "old": list(one.old), "new": list(one.new), "old_median": statistics.median(one.old),
            "new_median": statistics.median(one.new),
            "ratio": one.ratio if one.ratio is not None and math.isfinite(one.ratio) else None,
            "p": one.p, "word": one.word(), "worse": one.is_worse(max_ratio),
        }
        for one in compared
    ]  # fmt: skip
    verdict = sentence(compared, max_ratio)
    return {**facts, "machine": samples.machine, "figures": figures, "not_in_both": lacking, "verdict": verdict}


def _print_tables(facts: dict[str, Any], compared: list[Compared], lacking: list[str], max_ratio: float) -> None:
    console = Console()
    console.print(
        f"old {facts['old']}, new {facts['new']}: medians of {facts['rounds']} rounds each; p: {facts['test']}"
    )
    name = Column("figure", no_wrap=True)
    table = Table("bench", name, "unit", "better", "old", "new", "new/old", "p", "")
    for one in compared:
        ratio = "-" if one.ratio is None else f"{one.ratio:.3f}"
        medians = (f"{statistics.median(values):.3f}" for values in (one.old, one.new))
        row = (one.bench, one.figure.name, one.figure.unit, one.figure.better.value, *medians, ratio, f"{one.p:.4f}")
        table.add_row(*row, one.word())
    console.print(table)
    if lacking:
        console.print(f"not in both trees: {', '.join(lacking)}")
    console.print(sentence(compared, max_ratio), soft_wrap=True)
