"""Decode the agent's own JSON files (records, manifests) to dataclasses; msgspec checks the types.

Text is parsed by the standard library: msgspec's own parser refuses lone surrogates, which stand for bytes of a file
name in an error message (PEP 383) and are in records that exist.
"""

from __future__ import annotations

import json
from typing import TypeVar

import msgspec

T = TypeVar("T")


def decode(text: str | bytes, kind: type[T]) -> T:
    """Return the value of type `kind` that `text` describes. Unknown fields are ignored, missing ones get defaults.

    :raises ValueError: not JSON, a field without default is missing, or one has another type.
    """
    try:
        return msgspec.convert(json.loads(text), kind)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def encode(value: object) -> str:
    """Return `value`, a dataclass or a msgspec Struct, as JSON in ASCII without spaces."""
    return json.dumps(msgspec.to_builtins(value), separators=(",", ":"))
