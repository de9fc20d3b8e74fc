"""Text for people: sizes, durations, enum values, labels, plain tables, and text from guests made safe to print."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def printable(text: str) -> str:
    """Replace every character that could move the cursor, or hide or reorder text: guests choose some of it."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def printable_lines(text: str) -> str:
    """Remove the characters that `printable` replaces, except newlines and tabs."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "" for letter in text)


def size(number: float) -> str:
    """Return bytes as "512MiB" or "1.5GiB"."""
    for unit in _UNITS:
        if abs(number) < 1024 or unit == _UNITS[-1]:
            break
        number /= 1024
    return f"{number:.1f}".removesuffix(".0") + unit if abs(number) < 100 else f"{number:.0f}{unit}"


def duration(seconds: float) -> str:
    """Return a duration in one unit: "45s", "3m", "2h", "4d"; a negative one as "0s"."""
    for limit, divisor, unit in ((100, 1, "s"), (100 * 60, 60, "m"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{max(0, int(seconds / divisor))}{unit}"
    return f"{int(seconds / 86400)}d"


def since(moment: Timestamp) -> str:
    """Return the time that has passed since `moment`, as `duration` writes it."""
    return duration(time.time() - moment.seconds)


def until(moment: Timestamp) -> str:
    """Return the time that is left until `moment`, as `duration` writes it."""
    return duration(moment.seconds - time.time())


def labels(pairs: Any) -> str:
    """Return labels as "a=1,b=2", sorted by key."""
    return ",".join(f"{key}={value}" for key, value in sorted(pairs.items()))


def enum_word(enum: Any, number: int) -> str:
    """Return "running" for STATE_RUNNING of the protobuf enum `State`, or the number if the enum does not define it."""
    known = enum.values_by_number.get(number)
    return str(number) if known is None else str(known.name).partition("_")[2].lower()


def enum_field(message: Any, field: str) -> str:
    """Return the value of an enum field of a protobuf message as `enum_word` writes it."""
    return enum_word(message.DESCRIPTOR.fields_by_name[field].enum_type, getattr(message, field))


def table_lines(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a plain-text table: columns as wide as their content, two spaces apart, nothing cut."""
    body = [list(headers), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*body, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body]
