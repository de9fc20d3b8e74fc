"""Benchmarks of two trees in turns (old, new, old, new, ...), so that what else the machine does meets both."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.tools.bench.command import CompareError, run
from tests.tools.bench.worktree import Tree


@dataclass(frozen=True, slots=True)
class Side:
    """One of the trees. :param name: "old" or "new". :param command: runs its benchmarks, before their arguments."""

    name: str
    tree: Tree
    command: Sequence[str]


@dataclass(slots=True)
class Samples:
    """What was measured: (benchmark, figure) to one value of each round, by the side's name."""

    values: dict[str, dict[tuple[str, str], list[float]]] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def add(self, side: Side, bench: str, figures: Mapping[str, float]) -> None:
        """Add the figures of one turn."""
        mine = self.values.setdefault(side.name, {})
        for name, value in figures.items():
            mine.setdefault((bench, name), []).append(float(value))


def take_turns(
    sides: Sequence[Side], benches: Sequence[str], rounds: int, *, say: Callable[[str], None], per_turn: int = 1
) -> Samples:
    """Run each benchmark of each side `rounds` times, and return all figures.

    :param say: takes a line of progress after each turn.
    :param per_turn: rounds of the benchmark itself in one turn.
    :raises CompareError: a benchmark fails.
    """
    samples = Samples()
    for number in range(1, rounds + 1):
        for bench in benches:
            for side in sides:
                begun = time.monotonic()
                answer = _turn(side, bench, per_turn)
                samples.add(side, bench, answer["figures"])
                samples.machine = answer.get("machine", {})
                say(f"round {number} of {rounds}: {bench}, {side.name}: {time.monotonic() - begun:.1f} s")
    return samples


def _turn(side: Side, bench: str, per_turn: int) -> dict[str, Any]:
    """Return the object that one run prints. Only options that every commit has had are used."""
    command = [*side.command, bench, "--rounds", str(per_turn), "--json"]
    what = f"the benchmark {bench} of the {side.name} tree ({side.tree.commit})"
    output = run(command, side.tree.directory, side.tree.environment, what)
    try:
        answer: dict[str, Any] = json.loads(output.stdout.splitlines()[-1])
        if not all(isinstance(value, int | float) for value in answer["figures"].values()):
            raise ValueError("a figure is not a number")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        printed = f"{output.stdout[-200:]!r} {output.said}"
        raise CompareError(f"{what} printed no figures ({error}): {printed}") from error
    return answer
