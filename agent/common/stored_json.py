"""Decode the agent's own JSON files (records, manifests) to dataclasses; msgspec checks the types.

Text is parsed by the standard library: msgspec's own parser refuses lone surrogates, which stand for bytes of a file
name in an error message (PEP 383) and are in records that exist.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
_NO_NAMES: Mapping[str, str] = MappingProxyType({})


def decode(
    text: str | bytes,
    kind: type[T],
    dec_hook: Callable[[type, Any], object] | None = None,
    *,
    renamed: Mapping[str, str] = _NO_NAMES,
) -> T:
    """Return the value of type `kind` that `text` describes. Unknown fields are ignored, missing ones get defaults.

    :param dec_hook: converts (type, JSON value) for types that msgspec does not know; raises ValueError.
    :param renamed: former names of top-level fields, to their present ones. The present name wins if both are there.
    :raises ValueError: not JSON, a field without default is missing, or one has another type.
    """
    try:
        values = json.loads(text)
        if isinstance(values, dict):
            for former in renamed.keys() & values.keys():
                values.setdefault(renamed[former], values.pop(former))
        return msgspec.convert(values, kind, dec_hook=dec_hook)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def encode(value: object, enc_hook: Callable[[Any], object] | None = None) -> str:
    """Return `value`, a dataclass or a msgspec Struct, as JSON in ASCII without spaces.

    :param enc_hook: converts values of types that msgspec does not know.
    """
    return json.dumps(msgspec.to_builtins(value, enc_hook=enc_hook), separators=(",", ":"))
