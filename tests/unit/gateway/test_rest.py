"""Query parameters of REST requests."""

from __future__ import annotations

import pytest

from agent.gateway.errors import HttpError
from agent.gateway.rest.requests import capacity_bytes, label_filter, page_cursor


def test_label_filters() -> None:
    assert label_filter({"labels[job]": "x y", "limit": "1"}) == {"job": "x y"}
    assert label_filter({"labels": "{'job': 'x', 'a': 'b'}"}) == {"job": "x", "a": "b"}
    for wrong in ("{'a': 1}", "[]", "{", "x" * 5000, "{'a': __import__('os')}"):
        with pytest.raises(HttpError):
            label_filter({"labels": wrong})


def test_capacities_and_cursors() -> None:
    assert [capacity_bytes(value) for value in ("1GB", "1GiB", "300MB", "1.5 GB", 10**9, "400000 kB")] == [
        10**9, 2**30, 300 * 10**6, 15 * 10**8, 10**9, 4 * 10**8,
    ]  # fmt: skip
    for wrong in ("1 XB", "", "GB", "-1GB", "299MB", "21GiB", 5, "1e9"):
        with pytest.raises(HttpError):
            capacity_bytes(wrong)
    assert page_cursor("vol-1") == "vol-1"
    assert page_cursor("http://127.0.0.1:1/api/v2/volumes?limit=1&cursor=vol-2") == "vol-2"
    assert page_cursor("http://127.0.0.1:1/") == ""
