"""Sizes and times as people write them, and settings' values of any type from text or TOML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_SIZES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_TIMES = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE_NAMES = ("_bytes", "bytes_per_s")


def parse_size(text: str) -> int:
    """Returns bytes for "512MiB", "4G", "1024". :raises ValueError:"""
    match = re.fullmatch(r"(\d+)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes, or a number with KiB, MiB, GiB or TiB")
    return int(match[1]) * _SIZES[match[2]]


def parse_duration(text: str) -> float:
    """Returns seconds for "30s", "5m", "250ms", "1.5". :raises ValueError:"""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write seconds, or a number with ms, s, m, h or d")
    return float(match[1]) * _TIMES[match[2]]


def converted(name: str, kind: Any, value: Any) -> Any:
    """Returns the value of the setting `name` as its type. :raises ValueError, TypeError: it is none of that type."""
    text = isinstance(value, str)
    if kind is bool:
        if text and value.lower() in ("true", "false", "1", "0"):
            return value.lower() in ("true", "1")
        if isinstance(value, bool):
            return value
        raise ValueError("must be true or false")
    if isinstance(value, bool):
        raise ValueError("must not be true or false")
    if kind is int:
        return (parse_size(value) if name.endswith(_SIZE_NAMES) else int(value)) if text else _whole(value)
    if kind is float:
        return (parse_duration(value) if name.endswith("_s") else float(value)) if text else float(value)
    if kind is Path:
        return Path(value)
    if kind is str:
        if not text:
            raise ValueError("must be text")
        return value
    if kind == tuple[int, ...]:
        return tuple(_number(item) for item in (value.split(",") if text else value))
    if kind == tuple[str, ...]:
        return _words(value)
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValueError("must be a table of text")
    return dict(value)


def _words(value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("must be a list of text")
    return tuple(item.strip() for item in items if item.strip())


def _number(value: Any) -> int:
    """A number, or a size such as "512MiB"; ids of users are numbers, too."""
    return parse_size(value) if isinstance(value, str) else _whole(value)


def _whole(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError("must be a whole number")
    return value
