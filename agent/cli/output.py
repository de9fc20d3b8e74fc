"""Standard output: JSON for programs, lines and tables for people.

The JSON of a protobuf message has the field names of the .proto files. Enums are lower-case words ("running"), times
RFC 3339, durations seconds, bytes base64. A message or optional value that is not set is null; of a oneof, only the
member that is set appears.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from agent.cli import options
from agent.cli.formatting import enum_word, printable, table_lines

_COLOURS = {
    "running": "green", "ready": "green", "ok": "green",
    "failed": "red", "missing": "red", "unhealthy": "red",
    "creating": "yellow", "deleting": "yellow", "draining": "yellow", "warn": "yellow",
}  # fmt: skip


def json_enabled() -> bool:
    """Return whether --json was given."""
    return options.current().json


def print_json(value: Any) -> None:
    """Print one JSON object on a line of its own and flush."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def print_line(line: str) -> None:
    """Print one line for people and flush."""
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()


def print_result(value: dict[str, Any], line: str) -> None:
    """Print the result of a command: `value` with --json, else `line`."""
    if json_enabled():
        print_json(value)
    else:
        print_line(line)


def to_json(message: Any) -> dict[str, Any]:
    """Return a protobuf message as values for json.dumps; the module's docstring states the form."""
    result: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        oneof = field.containing_oneof
        if field.is_repeated:
            entry = field.message_type
            if entry is not None and entry.GetOptions().map_entry:
                result[field.name] = dict(value)
            else:
                result[field.name] = [_field_value(field, item) for item in value]
        elif not field.has_presence or message.HasField(field.name):
            result[field.name] = _field_value(field, value)
        elif oneof is None or oneof.name.startswith("_"):  # protoc wraps an optional field in a oneof "_NAME"
            result[field.name] = None
    return result


def _field_value(field: Any, value: Any) -> Any:
    if field.enum_type is not None:
        return enum_word(field.enum_type, value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if field.message_type is None:
        return value
    if field.message_type.full_name == "google.protobuf.Duration":
        return value.seconds + value.nanos / 1e9
    if field.message_type.full_name == "google.protobuf.Timestamp":
        try:
            return value.ToJsonString()
        except ValueError:  # outside of RFC 3339's years: a guest can report any time
            return None
    return to_json(value)


def print_facts(facts: Iterable[tuple[str, str]], width: int) -> None:
    """Print one "NAME  VALUE" line for each fact, with names padded to `width` columns."""
    for name, value in facts:
        print_line(f"{name:<{width}}{value}")


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]], fixed: int = 1) -> None:
    """Print a table. A terminal gets one that fits its width: all columns after the first `fixed` may be cut."""
    if not sys.stdout.isatty():
        sys.stdout.write("\n".join(table_lines(headers, rows)) + "\n")
        sys.stdout.flush()
        return
    from rich.console import Console

    Console().print(rich_table(headers, rows, fixed))


def rich_table(headers: Sequence[str], rows: Iterable[Sequence[str]], fixed: int = 1) -> Any:
    """Return a `rich.table.Table`; the first `fixed` columns are never cut."""
    from rich.table import Table
    from rich.text import Text

    cells = [[printable(cell) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, header in enumerate(headers):
        width = max([len(header), *(len(row[index]) for row in cells)])
        table.add_column(header, no_wrap=True, overflow="ellipsis", min_width=width if index < fixed else None)
    for row in cells:
        table.add_row(*(Text(cell, style=_COLOURS.get(cell, "")) for cell in row))
    return table
