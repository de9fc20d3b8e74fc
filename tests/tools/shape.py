"""Measure the sizes of modules, classes and functions in lines.

    python -m tests.tools.shape [--json] [--check] [PATH...]

PATHs are packages or files; default: agent, guest and rootfs. A module has the lines of its file; a class or function
has those from its `class` or `def` to its last statement, without decorators. Nested definitions are part of the outer
one and are counted again on their own.

`--check` exits with status 1 and names them if a class has more than 300 lines or a function more than 60.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("agent", "guest", "rootfs")
KINDS = ("module", "class", "function")
MAX_LINES = {"class": 300, "function": 60}
TOTAL = "all"


@dataclass(frozen=True)
class Definition:
    """A module, class or function, and its size."""

    kind: str
    group: str  # the top-level package (or the file) that was named
    name: str  # path:line, and the name of a class or function
    lines: int


def measure(paths: Sequence[Path]) -> list[Definition]:
    """Return the definitions in packages and files.

    :raises FileNotFoundError: a path does not exist, so nothing would be measured silently.
    """
    found: list[Definition] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no such package or file: {path}")
        for source in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found += _definitions(str(path), source)
    return found


def _definitions(group: str, source: Path) -> Iterator[Definition]:
    text = source.read_text()
    yield Definition("module", group, str(source), len(text.splitlines()))
    for node in ast.walk(ast.parse(text, source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Definition(kind, group, f"{source}:{node.lineno} {node.name}", lines)


def summarize(found: Sequence[Definition]) -> dict[str, dict[str, dict[str, int | float]]]:
    """Return count, median, 90th percentile (nearest rank) and maximum, by group and kind, and those of all groups."""
    summary: dict[str, dict[str, dict[str, int | float]]] = {}
    groups = dict.fromkeys(definition.group for definition in found)
    for group in [*groups, TOTAL]:
        of_group = [definition for definition in found if group in (TOTAL, definition.group)]
        sizes = {kind: sorted(each.lines for each in of_group if each.kind == kind) for kind in KINDS}
        summary[group] = {kind: _figures(lines) for kind, lines in sizes.items() if lines}
    return summary


def _figures(lines: list[int]) -> dict[str, int | float]:
    nearest_rank = -(-len(lines) * 9 // 10) - 1
    return {"count": len(lines), "median": statistics.median(lines), "p90": lines[nearest_rank], "max": lines[-1]}


def oversized(found: Sequence[Definition]) -> list[str]:
    """Return one line for each class or function that is too long, the longest first."""
    over = [each for each in found if each.kind in MAX_LINES and each.lines > MAX_LINES[each.kind]]
    over.sort(key=lambda each: -each.lines)
    return [f"{each.name}: a {each.kind} of {each.lines} lines, more than {MAX_LINES[each.kind]}" for each in over]


def _print_table(summary: dict[str, dict[str, dict[str, int | float]]]) -> None:
    print(f"{'lines of':<20} {'what':<9} {'count':>6} {'median':>7} {'p90':>5} {'max':>5}")
    for group, kinds in summary.items():
        for kind, of in kinds.items():
            print(f"{group:<20} {kind:<9} {of['count']:>6} {of['median']:>7g} {of['p90']:>5} {of['max']:>5}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.shape", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="only look for classes and functions that are too long")
    parser.add_argument("paths", nargs="*", type=Path, default=[Path(name) for name in PACKAGES], metavar="PATH")
    arguments = parser.parse_args(argv)
    try:
        found = measure(arguments.paths)
    except FileNotFoundError as error:
        parser.error(str(error))
    if arguments.check:
        over = oversized(found)
        print("\n".join(over), end="\n" if over else "")
        return 1 if over else 0
    summary = summarize(found)
    if arguments.json:
        print(json.dumps(summary, indent=1))
    else:
        _print_table(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
