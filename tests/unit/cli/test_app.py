"""`sandboxctl` as a process without a daemon: usage, help, JSON everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.cli import options
from tests.unit.cli.command import ctl

ID = "sbx-0123456789abcdef"


@pytest.fixture(autouse=True)
def _fresh_options() -> None:
    options.set_current(options.Options())


def test_no_daemon_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    for address in (f"unix:{tmp_path}/none", "127.0.0.1:1"):
        done = ctl("--insecure", "ls", SANDBOXD_ADDRESS=address)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"sandboxctl: no sandboxd answers at {address} (")
        assert done.stderr.endswith("start it with `sandboxd`, or give --address (DAEMON_UNREACHABLE)\n")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["--json", "ls"], ["ls", "--json"], ["image", "ls", "--json"]])
def test_json_is_accepted_everywhere(tmp_path: Path, words: list[str]) -> None:
    done = ctl(*words, SANDBOXD_ADDRESS=f"unix:{tmp_path}/none")
    assert done.returncode == 1
    assert json.loads(done.stderr)["error"]["reason"] == "DAEMON_UNREACHABLE"


def test_wrong_settings_are_an_error_with_status_2() -> None:
    done = ctl("ls", SANDBOXD_PATHS__RUN_DIRR="/x")
    assert done.returncode == 2
    assert "did you mean paths.run_dir?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["create", "--memory", "lots"],
        ["create", "--vcpus", "0"],
        ["create", "--env", "A"],
        ["create", "--lifetime", "1s", "--lease", "1s"],
        ["ls", "--state", "asleep"],
        ["exec", ID],
        ["exec", ID, "--"],
        ["rm"],
        ["rm", "--all", ID],
        ["update", ID],
        ["update", ID, "--expire-in", "1m", "--no-expire"],
        ["cp", "a", "b"],
        ["cp", f"{ID}:a", f"{ID}:b"],
        ["cp", "--json", f"{ID}:a", "-"],
        ["port-forward", ID, "0"],
        ["top", "--interval", "1ms"],
    ],
)
def test_usage_errors_have_status_2(words: list[str]) -> None:
    done = ctl(*words, SANDBOXD_ADDRESS="unix:/nowhere/at/all")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: sandboxctl" in done.stderr


def test_help_needs_neither_grpc_nor_rich() -> None:
    script = (
        "import sys\nfrom agent.cli.app import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('grpc', 'rich', 'asyncio', 'google.protobuf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "port-forward" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_a_second_run_does_not_inherit_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from agent.cli.app import app

    for words, is_json in (["ls", "--json"], True), (["ls"], False):
        with pytest.raises(SystemExit) as caught:
            app(["--address", f"unix:{tmp_path}/none", *words])
        assert caught.value.code == 1
        assert capsys.readouterr().err.startswith("{") is is_json


def _commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, (*words, name))


def test_each_command_has_a_help_line_that_is_not_cut_and_help_for_each_parameter() -> None:
    import typer

    from agent.cli.app import app

    seen = 0
    for words, command in _commands(typer.main.get_command(app)):
        seen += 1
        # What is left of 80 columns beside the longest name.
        assert not words or not command.get_short_help_str(62).endswith("..."), words
        for parameter in command.params:
            assert parameter.help, (words, parameter.name)
    assert seen > 30
