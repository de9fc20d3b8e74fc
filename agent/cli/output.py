"""What goes to stdout: JSON for programs, tables for people.

JSON of a message has the field names of the protos. Numbers are numbers, enums their lower-case word ("running"), times
RFC 3339, durations seconds, bytes base64. A message or optional value that is not set is null; of a oneof only the
member that is set appears.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from agent.cli import options
from agent.cli.text import age, printable, table_lines

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

_COLOURS = {
    "running": "green", "ready": "green", "ok": "green",
    "failed": "red", "missing": "red", "unhealthy": "red",
    "creating": "yellow", "deleting": "yellow", "draining": "yellow", "warn": "yellow",
}  # fmt: skip


def to_json(message: Any) -> dict[str, Any]:
    """Returns a protobuf message as what json.dumps takes; see the module's text for the form."""
    result: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        oneof = field.containing_oneof
        if field.is_repeated:
            entry = field.message_type
            if entry is not None and entry.GetOptions().map_entry:
                result[field.name] = dict(value)
            else:
                result[field.name] = [_value(field, item) for item in value]
        elif not field.has_presence or message.HasField(field.name):
            result[field.name] = _value(field, value)
        elif oneof is None or oneof.name.startswith("_"):  # "_name" is how protoc marks a lone optional
            result[field.name] = None
    return result


def _value(field: Any, value: Any) -> Any:
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
        except ValueError:  # a guest may say any time
            return None
    return to_json(value)


def enum_word(enum: Any, number: int) -> str:
    """Returns "running" for STATE_RUNNING of an enum `State`; the number as text where it is unknown."""
    known = enum.values_by_number.get(number)
    return str(number) if known is None else str(known.name).partition("_")[2].lower()


def emit(value: Any) -> None:
    """Prints one JSON object on a line of its own, at once."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def say(line: str) -> None:
    """Prints a line for people, at once."""
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()


def json_wanted() -> bool:
    """Whether stdout is for programs."""
    return options.current().json


def since(moment: Timestamp) -> str:
    """Returns how long ago a time was."""
    return age(time.time() - moment.seconds)


def until(moment: Timestamp) -> str:
    """Returns how far ahead a time is."""
    return age(moment.seconds - time.time())


def labels_text(labels: Any) -> str:
    """Returns labels on one line, sorted."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]], fixed: int = 1) -> None:
    """Prints a table. On a terminal the last columns are cut to its width, but never the first `fixed` ones."""
    if not sys.stdout.isatty():
        sys.stdout.write("\n".join(table_lines(headers, rows)) + "\n")
        sys.stdout.flush()
        return
    from rich.console import Console

    Console().print(rich_table(headers, rows, fixed))


def rich_table(headers: Sequence[str], rows: Iterable[Sequence[str]], fixed: int = 1) -> Any:
    """Returns the table as rich draws it."""
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
