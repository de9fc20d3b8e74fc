"""Parse the bodies and query parameters of REST requests."""

from __future__ import annotations

import ast
import re
from typing import TypeVar
from urllib.parse import parse_qs, urlsplit

import msgspec
from aiohttp import web

from agent.gateway.errors import HttpError

_LABEL = re.compile(r"labels\[(.+)\]")
_MAX_FILTER_CHARS = 4096
_DEFAULT_LIMIT, _MAX_LIMIT = 100, 1000
_MIN_CAPACITY_BYTES, _MAX_CAPACITY_BYTES = 300 * 10**6, 20 * 2**30
_CAPACITY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?(B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB)")
_FACTORS = {
    "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20,
    "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip

_T = TypeVar("_T")


async def json_body(request: web.Request, kind: type[_T]) -> _T:
    """Decode the JSON body of a request; an empty body is {}.

    :raises HttpError: 400, the body does not fit the type.
    """
    try:
        return msgspec.json.decode(await request.read() or b"{}", type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise HttpError(400, "INVALID_BODY", f"the body is not valid: {error}") from None


def label_filter(query: dict[str, str]) -> dict[str, str]:
    """Return the labels of a filter: `labels[k]=v`, or one `labels` that holds a Python dict, as the Python SDK sends.

    :raises HttpError: 400, `labels` is not a dict of strings.
    """
    labels = {match[1]: value for name, value in query.items() if (match := _LABEL.fullmatch(name))}
    text = query.get("labels")
    if text:
        try:
            value = ast.literal_eval(text) if len(text) <= _MAX_FILTER_CHARS else None
            labels |= msgspec.convert(value, dict[str, str])
        except (ValueError, SyntaxError, MemoryError, RecursionError, msgspec.ValidationError):
            raise HttpError(
                400, "INVALID_FILTER", f"labels={text[:80]!r} is not a filter; write labels[key]=value"
            ) from None
    return labels


def capacity_bytes(value: int | str) -> int:
    """Convert a capacity to bytes: a number of bytes, or a text such as "10GB".

    :raises HttpError: 400, the text is not a size, or the size is out of range.
    """
    if isinstance(value, str):
        match = _CAPACITY.fullmatch(value)
        if match is None:
            raise HttpError(400, "INVALID_CAPACITY", f'capacity {value[:40]!r} is not a size such as "10GB" or "1GiB"')
        value = int(float(match[1]) * _FACTORS[match[2]])
    if not _MIN_CAPACITY_BYTES <= value <= _MAX_CAPACITY_BYTES:
        raise HttpError(400, "INVALID_CAPACITY", f"capacity is {value} bytes; it must be from 300 MB to 20 GB")
    return value


def page_limit(text: str | None) -> int:
    """Parse the parameter `limit` of a list.

    :raises HttpError: 400, it is not a number in the allowed range.
    """
    if not text:
        return _DEFAULT_LIMIT
    if not text.isdecimal() or not 1 <= int(text[:9]) <= _MAX_LIMIT:
        raise HttpError(400, "INVALID_LIMIT", f"limit must be from 1 to {_MAX_LIMIT}")
    return int(text)


def page_cursor(text: str) -> str:
    """Parse the parameter `cursor`: the last id of the previous page; the Python SDK sends the URL of the next page."""
    if "://" in text:
        text = parse_qs(urlsplit(text).query).get("cursor", [""])[0]
    return text
