"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from tests.tools.bench import boot, egress, files, recover, sdk, stream
from tests.tools.bench import exec as exec_bench
from tests.tools.bench.figures import Figure
from tests.tools.bench.harness import Report, Target, target


class _OnTarget(Protocol):
    FIGURES: tuple[Figure, ...]

    async def measure(self, target: Target) -> None: ...


class _Alone(Protocol):
    FIGURES: tuple[Figure, ...]

    async def measure(self, report: Report) -> None: ...


_ON_TARGET: dict[str, _OnTarget] = {"exec": exec_bench, "stream": stream, "files": files}
_ALONE: dict[str, _Alone] = {"boot": boot, "egress": egress, "sdk": sdk, "recover": recover}
NAMES = sorted([*_ON_TARGET, *_ALONE])


def declared(names: Iterable[str]) -> tuple[Figure, ...]:
    """Return the figures that these benchmarks declare."""
    modules: dict[str, _OnTarget | _Alone] = {**_ON_TARGET, **_ALONE}
    return tuple(figure for name in names for figure in modules[name].FIGURES)


async def measure(names: Iterable[str], report: Report) -> None:
    """Run benchmarks one after the other; their figures are in the report then."""
    for name in names:
        if name in _ALONE:
            await _ALONE[name].measure(report)
            continue
        async with target(report) as one:  # a sandbox of its own for each
            await _ON_TARGET[name].measure(one)
