"""Text for people: sizes, durations, hostile text, plain tables."""

from __future__ import annotations

import pytest

from agent.cli import formatting


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0B"), (1023, "1023B"), (1024, "1KiB"), (1536, "1.5KiB"), (512 << 20, "512MiB"), (5 << 40, "5TiB")],
)
def test_sizes(number: int, shown: str) -> None:
    assert formatting.size(number) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-1, "0s"), (99, "99s"), (100, "1m"), (3600, "60m"), (6000, "1h"), (48 * 3600, "2d")]
)
def test_ages(seconds: float, shown: str) -> None:
    assert formatting.duration(seconds) == shown


def test_what_a_guest_writes_cannot_steer_a_terminal() -> None:
    hostile = "a\x1b]0;title\x07b\r\u202ec\nd\te"
    assert formatting.printable(hostile) == "a\ufffd]0;title\ufffdb\ufffd\ufffdc\ufffdd\ufffde"
    assert formatting.printable_lines(hostile) == "a]0;titlebc\nd\te"


def test_table_lines_align_and_keep_one_line_a_row() -> None:
    assert formatting.table_lines(("A", "LONG"), [("xyz", "1"), ("\n", "2")]) == ["A    LONG", "xyz  1", "\ufffd    2"]
