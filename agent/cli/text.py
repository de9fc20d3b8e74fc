"""Words and numbers as people write and read them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import typer

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def printable(text: str) -> str:
    """Returns text that cannot move a cursor, hide or reorder what is shown: guests choose some of it."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def printable_lines(text: str) -> str:
    """Returns `printable` text that keeps its lines and tabs."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "" for letter in text)


def size(number: float) -> str:
    """Returns bytes as "512MiB", "1.5GiB"."""
    for unit in _UNITS:
        if abs(number) < 1024 or unit == _UNITS[-1]:
            break
        number /= 1024
    return f"{number:.1f}".removesuffix(".0") + unit if abs(number) < 100 else f"{number:.0f}{unit}"


def age(seconds: float) -> str:
    """Returns a span in its largest unit: "45s", "3m", "2h", "4d"."""
    for limit, divisor, unit in ((100, 1, "s"), (100 * 60, 60, "m"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{max(0, int(seconds / divisor))}{unit}"
    return f"{int(seconds / 86400)}d"


def size_option(text: str) -> int:
    """Parses an option such as --memory 512MiB."""
    from agent.common.quantities import parse_size

    try:
        return parse_size(str(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def duration_option(text: str) -> float:
    """Parses an option such as --lifetime 10m; seconds."""
    from agent.common.quantities import parse_duration

    try:
        return parse_duration(str(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def pairs(words: Iterable[str], option: str, *, value_needed: bool = True) -> dict[str, str]:
    """Returns K=V words as a mapping; the last of equal keys counts."""
    result = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not key or (value_needed and not separator):
            raise typer.BadParameter(f"{word!r} is not of the form KEY=VALUE", param_hint=option)
        result[key] = value
    return result


def env_file(path: Path) -> dict[str, str]:
    """Returns the variables of a file with a KEY=VALUE on each line; blank lines and those that begin with # are none.

    Values are taken as they are: no quotes, no expansion.
    """
    result = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}", param_hint="--env-file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, separator, value = line.partition("=")
        if not separator or not key.strip():
            raise typer.BadParameter(f"{path}, line {number}: write KEY=VALUE", param_hint="--env-file")
        result[key.strip()] = value
    return result


def table_lines(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Returns a table as plain lines: columns as wide as their content, two spaces between, nothing cut."""
    body = [list(headers), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*body, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body]
