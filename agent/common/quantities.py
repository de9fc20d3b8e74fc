"""Parse sizes and durations with units, and convert values of settings to the types of their fields.

`Bytes` and `Seconds` are the types of fields whose values may be text with a unit.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec

_SIZES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_TIMES = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Return the bytes of "512MiB", "4G" or "1024".

    :raises ValueError: not a number with one of these units.
    """
    match = re.fullmatch(r"(\d+)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes, or a number with KiB, MiB, GiB or TiB")
    return int(match[1]) * _SIZES[match[2]]


def parse_duration(text: str) -> float:
    """Return the seconds of "30s", "5m", "250ms" or "1.5".

    :raises ValueError: not a number with one of these units.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write seconds, or a number with ms, s, m, h or d")
    return float(match[1]) * _TIMES[match[2]]


Bytes = Annotated[int, msgspec.Meta(extra={"parse": parse_size})]
Seconds = Annotated[float, msgspec.Meta(extra={"parse": parse_duration})]

_TRUTH = {"true": True, "1": True, "false": False, "0": False}
_PARSERS: dict[Any, Callable[[str], object]] = {
    bool: lambda text: _TRUTH.get(text.lower(), text),
    int: int,
    float: float,
}
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "text"}


def converted(kind: Any, value: Any) -> Any:
    """Return the value of a setting as the type of its field, from TOML's types or from text.

    :param kind: bool, int, float, str, Path, `Bytes`, `Seconds`, a Literal of texts, a tuple of one of these (in text
        with commas between the items), or a Mapping from text to text.
    :raises ValueError: `value` is not of that type; the message says what it must be.
    """
    try:
        return msgspec.convert(_parsed(kind, value), kind, dec_hook=_from_plain)
    except msgspec.ValidationError:
        wrong = "must not be true or false" if isinstance(value, bool) else f"must be {_expected(kind)}"
        raise ValueError(wrong if get_origin(kind) is not Literal else f"{wrong}, not {value!r}") from None


def _parsed(kind: Any, value: Any) -> Any:
    """Return `value` with text in it parsed where `kind` is not text; what cannot be parsed stays for msgspec."""
    if get_origin(kind) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list):
            return value
        words = [item.strip() if isinstance(item, str) else item for item in items]
        return [_parsed(get_args(kind)[0], word) for word in words if word != ""]
    if not isinstance(value, str):
        return value
    if get_origin(kind) is Annotated:
        (meta,) = kind.__metadata__
        return meta.extra["parse"](value)  # its error says which units there are
    with contextlib.suppress(ValueError):
        return _PARSERS.get(kind, str)(value)
    return value


def _from_plain(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"not a {kind.__name__}")  # msgspec makes a ValidationError of it


def _expected(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _expected(arguments[0])
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        return "a list of text" if arguments[0] is str else "a list of whole numbers"
    return _EXPECTED.get(kind, "a table of text")
