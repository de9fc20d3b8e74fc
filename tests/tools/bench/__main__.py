"""Command line of the benchmarks: `python -m tests.tools.bench NAME... [--json] [--rounds N]`."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import sys

from tests.tools.bench import boot, egress, files, recover, sdk, stream
from tests.tools.bench import exec as exec_bench
from tests.tools.bench.harness import Report, target

_BENCHES = {"exec": exec_bench.measure, "stream": stream.measure, "files": files.measure}  # on a sandbox that is there
_ALONE = {"boot": boot.measure, "egress": egress.measure, "sdk": sdk.measure, "recover": recover.measure}
_ROUNDS, _BOOT_ROUNDS = 10, 30


async def _run(names: list[str], rounds: int) -> Report:
    report = Report(rounds=rounds)
    for name in names:
        if name in _ALONE:
            await _ALONE[name](report, rounds)
            continue
        async with target(report, rounds) as one:
            await _BENCHES[name](one)
    return report


def main() -> int:
    """Runs the benchmarks named and prints their figures."""
    parser = argparse.ArgumentParser(prog="just bench", description=__doc__)
    choices = sorted([*_BENCHES, *_ALONE])
    parser.add_argument("names", nargs="+", choices=choices, metavar="NAME", help=", ".join(choices))
    parser.add_argument("--json", action="store_true", help="one JSON object, and nothing else on standard output")
    parser.add_argument("--rounds", type=int, help=f"how often each is measured ({_ROUNDS}; boot: {_BOOT_ROUNDS})")
    parser.add_argument("--plot", metavar="FILE", help="also draw where the time of a create goes, as a PNG (boot)")
    options = parser.parse_args()
    rounds = options.rounds or (_BOOT_ROUNDS if "boot" in options.names else _ROUNDS)
    if rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.plot and ("boot" not in options.names or importlib.util.find_spec("matplotlib") is None):
        parser.error("--plot needs the benchmark boot, and matplotlib: just waterfall")
    report = asyncio.run(_run(options.names, rounds))
    bench = " ".join(options.names)
    report.print_json(bench) if options.json else report.print_table(bench)
    if options.plot:
        from tests.tools.bench import waterfall  # only now: what it draws with takes a second to load

        waterfall.draw(report, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
