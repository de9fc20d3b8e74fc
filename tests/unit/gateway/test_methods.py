"""The method table, and conversions of the method handlers."""

from __future__ import annotations

import pytest

from agent.gateway.errors import CallError
from agent.gateway.methods.file_info import times
from agent.gateway.methods.table import METHODS


def test_every_method_of_the_protocol_is_there() -> None:
    assert len(METHODS) == 54


def test_times() -> None:
    made = times("2020-01-02T03:04:05.678Z", 5.5)
    assert made["access_time"].ToJsonString() == "2020-01-02T03:04:05.678Z"
    assert made["modify_time"].ToMicroseconds() == 5_500_000
    for wrong in ("yesterday", float("inf"), float("nan"), 1e300):
        with pytest.raises(CallError):
            times(wrong, 0.0)
