"""Errors on stderr, and exit statuses."""

from __future__ import annotations

import json

import pytest

from agent.cli import options
from agent.cli.errors import CliError, print_error, process_exit_status
from sandboxd.v1 import process_pb2


@pytest.fixture(autouse=True)
def _fresh_options() -> None:
    options.set_current(options.Options())


def test_errors_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    error = CliError("it\x1b[31m failed\nhere", reason="SOME_REASON", code="NOT_FOUND")
    print_error(error)
    assert capsys.readouterr().err == "sandboxctl: it[31m failed\nhere (SOME_REASON)\n"
    options.set_current(options.Options(json=True))
    print_error(error)
    body = json.loads(capsys.readouterr().err)["error"]
    assert (body["reason"], body["metadata"]) == ("SOME_REASON", {"code": "NOT_FOUND"})


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert process_exit_status(process_pb2.Exit(exit_code=3)) == 3
    assert process_exit_status(process_pb2.Exit(signal="SIGTERM", signal_number=15)) == 143
    assert capsys.readouterr().err == ""
    assert process_exit_status(process_pb2.Exit(signal="SIGKILL", signal_number=9, oom_killed=True)) == 137
    assert "no memory left" in capsys.readouterr().err
