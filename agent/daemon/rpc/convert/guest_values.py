"""Read fields of answers from guests, with checks of type and range: guests are hostile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.common.errors import GuestUnreachable


def malformed(field: str) -> GuestUnreachable:
    """Return the error for a field of an answer that is missing, of a wrong type or out of range."""
    return GuestUnreachable(f"malformed answer from the guest: {field}", reason="GUEST_MALFORMED")


def guest_dict(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the object in field `name`.

    :raises GuestUnreachable: the field is not an object.
    """
    value = values.get(name)
    if not isinstance(value, dict):
        raise malformed(name)
    return value


def guest_list(values: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the list of objects in field `name`.

    :raises GuestUnreachable: the field is not a list of objects.
    """
    value = values.get(name)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise malformed(name)
    return value


def guest_int(values: Mapping[str, Any], name: str, low: int = 0, high: int = (1 << 63) - 1) -> int:
    """Return the integer in field `name`.

    :raises GuestUnreachable: the field is not an integer from `low` to `high`.
    """
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise malformed(name)
    return value


def guest_float(values: Mapping[str, Any], name: str) -> float:
    """Return the number in field `name`.

    :raises GuestUnreachable: the field is not a number, or its absolute value is 1e18 or more.
    """
    value = values.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e18 < value < 1e18:
        raise malformed(name)
    return float(value)


def guest_text(values: Mapping[str, Any], name: str) -> str:
    """Return the text in field `name`, as `printable`.

    :raises GuestUnreachable: the field is not text.
    """
    value = values.get(name)
    if not isinstance(value, str):
        raise malformed(name)
    return printable(value)


def printable(text: str) -> str:
    """Return text that protobuf can encode: bytes that were not UTF-8 in the guest (PEP 383) become U+FFFD."""
    if text.isascii():
        return text
    try:
        return text.encode(errors="surrogateescape").decode(errors="replace")
    except UnicodeEncodeError:  # surrogates outside of U+DC80 to U+DCFF stand for no byte
        return text.encode(errors="replace").decode()
