"""Draws where the time of a create goes: one bar per phase, each beginning where the one before it ended."""

from __future__ import annotations

from matplotlib.figure import Figure

from tests.tools.bench.harness import Report, percentile

_PREFIX, _SUFFIX = "phase: ", ", ms"
_OUTER = "guest.configure"
_INNER = ("guest.entropy", "guest.clock", "guest.root", "guest.names", "guest.network", "guest.resolver")


def phases(report: Report) -> list[tuple[str, float, float, float]]:
    """Returns (name, start, median, 95th percentile) of each phase, in milliseconds."""
    rows: list[tuple[str, float, float, float]] = []
    start = 0.0
    for series, samples in report.series.items():
        if series.startswith(_PREFIX):
            name = series.removeprefix(_PREFIX).removesuffix(_SUFFIX)
            median = report.median(series)
            if name == _OUTER:  # its parts came before it
                start -= sum(row[2] for row in rows if row[0] in _INNER)
            rows.append((name, start, median, percentile(samples, 95)))
            start += median
    return rows


def draw(report: Report, path: str) -> None:
    """Writes the PNG."""
    rows = phases(report)
    figure = Figure(figsize=(9, 0.36 * len(rows) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, start, median, slow) in enumerate(rows):
        axes.barh(index, median, left=start, color="#9db8d9" if name in _INNER else "#35618f")
        axes.text(start + median + 4, index, f"{median:.1f} ms (95 %: {slow:.1f})", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(row[1] + row[2] for row in rows) * 1.25)
    axes.set_xlabel("milliseconds since the call")
    machine = ", ".join(str(report.machine[key]) for key in ("vmm", "cpu") if key in report.machine)
    axes.set_title(
        f"CreateSandbox to the first byte of echo, medians of {report.rounds} rounds ({machine})", fontsize=9
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
