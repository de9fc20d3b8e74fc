"""Command line of the benchmarks: `python -m tests.tools.bench NAME... [--json] [--rounds N]`."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import sys

from tests.tools.bench import compare
from tests.tools.bench.benches import NAMES, declared, measure
from tests.tools.bench.figures import faults
from tests.tools.bench.harness import Report

_ROUNDS, _BOOT_ROUNDS = 10, 30


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="just bench", description=__doc__)
    parser.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--json", action="store_true", help="one JSON object, and nothing else on standard output")
    parser.add_argument("--rounds", type=int, help=f"how often each is measured ({_ROUNDS}; boot: {_BOOT_ROUNDS})")
    parser.add_argument("--small", action="store_true", help="small sizes: shows that it works, not how fast")
    parser.add_argument("--plot", metavar="FILE", help="also draw where the time of a create goes, as a PNG (boot)")
    compare.add_arguments(parser)
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.plot and ("boot" not in options.names or importlib.util.find_spec("matplotlib") is None):
        parser.error("--plot needs the benchmark boot, and matplotlib: just waterfall")
    compare.check_arguments(parser, options)
    return options


def main() -> int:
    """Run the benchmarks that are named, or compare two commits by them; return the exit status."""
    options = _arguments()
    if options.compare is not None:
        return compare.main(options)
    rounds = options.rounds or (_BOOT_ROUNDS if "boot" in options.names else _ROUNDS)
    report = Report(rounds=rounds, small=options.small)
    asyncio.run(measure(options.names, report))
    figures = declared(options.names)
    if wrong := faults(figures, report.figures):
        raise SystemExit(f"the figures are not as declared: {'; '.join(wrong)}")
    bench = " ".join(options.names)
    report.print_json(bench) if options.json else report.print_table(bench, figures)
    if options.plot:
        from tests.tools.bench import waterfall  # only now: what it draws with takes a second to load

        waterfall.draw(report, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
