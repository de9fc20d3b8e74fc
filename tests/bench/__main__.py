"""Command line of the benchmarks: `python -m tests.bench exec stream files [--json] [--rounds N]`."""

from __future__ import annotations

import argparse
import asyncio
import sys

from tests.bench import exec as exec_bench
from tests.bench import files, stream
from tests.bench.harness import Report, target

_BENCHES = {"exec": exec_bench.measure, "stream": stream.measure, "files": files.measure}
_ROUNDS = 10


async def _run(names: list[str], rounds: int) -> Report:
    report = Report(rounds=rounds)
    for name in names:
        async with target(report, rounds) as one:
            await _BENCHES[name](one)
    return report


def main() -> int:
    """Runs the benchmarks named and prints their figures."""
    parser = argparse.ArgumentParser(prog="just bench", description=__doc__)
    parser.add_argument("names", nargs="+", choices=sorted(_BENCHES), metavar="NAME", help=", ".join(_BENCHES))
    parser.add_argument("--json", action="store_true", help="one JSON object, and nothing else on standard output")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="how often each is measured (%(default)s)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    report = asyncio.run(_run(options.names, options.rounds))
    bench = " ".join(options.names)
    report.print_json(bench) if options.json else report.print_table(bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
