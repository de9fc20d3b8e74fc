"""The table of docs/reliability.md: each fault test says what was promised and what it saw.

With SANDBOXD_RELIABILITY set to a file, rows are appended to it;
`python -m tests.tools.reliability FILE` makes the page.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
VARIABLE = "SANDBOXD_RELIABILITY"
_HEAD = """# Faults, what is promised, and what was seen

Made by `just reliability` from a run of the tests that are named: do not edit it by hand.

"""


class Reliability:
    """The rows of one test."""

    def __init__(self, test: str) -> None:
        self._test = test

    def seen(self, fault: str, promised: str, seen: str) -> None:
        """Adds a row, once all that it says has been checked."""
        if path := os.environ.get(VARIABLE):
            with Path(path).open("a") as file:
                file.write(json.dumps([fault, promised, seen, self._test]) + "\n")


def page(rows: list[list[str]]) -> str:
    """Returns the page."""
    lines = ["| fault | promised | seen | test |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row[:3])} | `{row[3]}` |" for row in sorted(rows)]
    return _HEAD + "\n".join(lines) + "\n"


def main(path: str) -> None:
    """Makes the page of a file of rows."""
    PAGE.write_text(page([json.loads(line) for line in Path(path).read_text().splitlines()]))


if __name__ == "__main__":
    main(sys.argv[1])
