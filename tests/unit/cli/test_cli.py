"""`sandboxctl` by itself: words, options, tables, JSON, addresses. No daemon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from agent.cli import connect, formatting, options, output
from agent.cli.commands.copy import Location
from agent.cli.commands.host_checks import Status, host_checks
from agent.cli.commands.port_forward import parse_ports
from agent.cli.commands.top import cpu_percent
from agent.cli.errors import CliError, print_error, process_exit_status
from agent.cli.transfer.entry import copy_name
from agent.cli.transfer.guest_shell import escaped
from agent.common.config.daemon import VmmSettings
from agent.common.config.settings import Settings
from sandboxd.v1 import process_pb2, sandbox_pb2

ID = "sbx-0123456789abcdef"


@pytest.fixture(autouse=True)
def _fresh_options() -> None:
    options.set_current(options.Options())


def ctl(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `sandboxctl` with no settings but these."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("SANDBOXD_")}
    argv = [sys.executable, "-m", "agent.cli.app", *words]
    return subprocess.run(argv, env=own | env, capture_output=True, text=True, timeout=60, check=False)


# -- words and numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0B"), (1023, "1023B"), (1024, "1KiB"), (1536, "1.5KiB"), (512 << 20, "512MiB"), (5 << 40, "5TiB")],
)
def test_sizes(number: int, shown: str) -> None:
    assert formatting.size(number) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-1, "0s"), (99, "99s"), (100, "1m"), (3600, "60m"), (6000, "1h"), (48 * 3600, "2d")]
)
def test_ages(seconds: float, shown: str) -> None:
    assert formatting.duration(seconds) == shown


def test_what_a_guest_writes_cannot_steer_a_terminal() -> None:
    hostile = "a\x1b]0;title\x07b\r\u202ec\nd\te"
    assert formatting.printable(hostile) == "a\ufffd]0;title\ufffdb\ufffd\ufffdc\ufffdd\ufffde"
    assert formatting.printable_lines(hostile) == "a]0;titlebc\nd\te"


def test_pairs() -> None:
    assert options.parse_pairs(["A=1", "B=x=y", "A=2", "C="], "--env") == {"A": "2", "B": "x=y", "C": ""}
    assert options.parse_pairs(["A"], "--label", value_needed=False) == {"A": ""}
    for wrong in ("A", "=1", ""):
        with pytest.raises(typer.BadParameter):
            options.parse_pairs([wrong], "--env")


def test_env_file(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text("# comment\n\nA=1\nB = two words # kept\n")
    assert options.read_env_file(path) == {"A": "1", "B": " two words # kept"}
    path.write_text("A=1\nnonsense\n")
    with pytest.raises(typer.BadParameter, match="line 2"):
        options.read_env_file(path)
    with pytest.raises(typer.BadParameter, match="cannot read"):
        options.read_env_file(tmp_path / "none")


def test_table_lines_align_and_keep_one_line_a_row() -> None:
    assert formatting.table_lines(("A", "LONG"), [("xyz", "1"), ("\n", "2")]) == ["A    LONG", "xyz  1", "\ufffd    2"]


def test_a_table_on_a_terminal_fits_80_columns_and_keeps_its_ids() -> None:
    from rich.console import Console

    headers = ("ID", "STATE", "IMAGE", "CPU", "MEMORY", "AGE", "EXPIRES", "LABELS")
    rows = [(ID, "running", "default", "32", "16.5GiB", "47h", "100m", "a=" + "x" * 300)]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(output.rich_table(headers, rows, fixed=2))
    console.file.close()
    lines = console.export_text().splitlines()
    assert len(lines) == 2
    assert max(len(line) for line in lines) <= 80
    assert lines[1].startswith(f"{ID}  running")


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_json_of_a_message() -> None:
    sandbox = sandbox_pb2.Sandbox(id=ID, state=sandbox_pb2.Sandbox.STATE_RUNNING, memory_bytes=1 << 40)
    sandbox.labels["a"] = "b"
    sandbox.create_time.FromJsonString("2026-01-01T00:00:00Z")
    sandbox.lifetime.lease.FromMilliseconds(1500)
    sandbox.phases.add(name="boot").duration.FromMilliseconds(2500)
    shown = json.loads(json.dumps(output.to_json(sandbox)))
    assert shown["state"] == "running"
    assert shown["memory_bytes"] == 1 << 40
    assert shown["labels"] == {"a": "b"}
    assert shown["create_time"] == "2026-01-01T00:00:00Z"
    assert shown["expire_time"] is None
    assert shown["lifetime"] == {"lease": 1.5, "idle_timeout": None}
    assert shown["phases"] == [{"name": "boot", "duration": 2.5}]


def test_json_of_bytes_oneofs_and_optionals() -> None:
    assert output.to_json(process_pb2.ExecResponse(stdout=b"\xff")) == {"stdout": "/w=="}
    assert output.to_json(process_pb2.Exit(signal="SIGKILL", signal_number=9))["exit_code"] is None
    assert output.to_json(process_pb2.Exit(exit_code=0))["exit_code"] == 0


# -- errors ------------------------------------------------------------------------------------------------------------


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


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("unix:/a/b", "unix:/a/b"),
        ("unix:///a/b", "unix:/a/b"),
        ("/a/b", "unix:/a/b"),
        ("localhost:1", "localhost:1"),
        ("[::1]:80", "[::1]:80"),
    ],
)
def test_addresses(given: str, meant: str) -> None:
    options.set_current(options.Options(address=given))
    assert connect.address() == meant


@pytest.mark.parametrize("given", ["unix:relative", "unix:", "host", "host:", ":80", "host:http", "host:70000"])
def test_wrong_addresses(given: str) -> None:
    options.set_current(options.Options(address=given))
    with pytest.raises(CliError) as caught:
        connect.address()
    assert caught.value.status == 2


def test_the_default_address_is_that_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOXD_PATHS__RUN_DIR", "/elsewhere")
    assert connect.address() == "unix:/elsewhere/sandboxd.sock"
    monkeypatch.setenv("SANDBOXD_API__UNIX_SOCKET", "/other.sock")
    assert connect.address() == "unix:/other.sock"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--address", "localhost:1", "ls"], "--tls-ca"),
        (["--address", "192.0.2.1:1", "--insecure", "ls"], "loopback"),
        (["--address", "localhost:1", "--insecure", "--tls-ca", "/x", "ls"], "--tls-cert"),
        (["--address", "localhost:1", "--tls-ca", "/x", "--tls-cert", "/y", "--tls-key", "/z", "ls"], "cannot read /x"),
    ],
)
def test_tcp_needs_tls_or_loopback(words: list[str], message: str) -> None:
    done = ctl(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


# -- the command itself ------------------------------------------------------------------------------------------------


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


# -- parts of commands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "ports"), [("80", (80, 80)), ("8080:80", (8080, 80)), (":80", (0, 80)), ("0:80", (0, 80))]
)
def test_ports(word: str, ports: tuple[int, int]) -> None:
    assert parse_ports(word) == ports


@pytest.mark.parametrize("word", ["", "0", "http", "1:2:3", "80:", "70000:1", "1:70000", "-1:80"])
def test_wrong_ports(word: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_ports(word)


def test_places() -> None:
    assert Location.parse(f"{ID}:/a:b") == Location(ID, "/a:b")
    assert Location.parse(f"{ID}:") == Location(ID, "")
    for here in ("/a", "a:b", "sbx-short:/a", "-", f"./{ID}:x"):
        assert Location.parse(here) == Location("", here)


@pytest.mark.parametrize(
    ("path", "name"), [("/a/b", b"b"), ("b/", b"b"), (".", b""), ("a/.", b""), ("..", b""), ("/", b""), ("a/..", b"")]
)
def test_own_names(path: str, name: bytes) -> None:
    assert copy_name(path) == name


def test_escaped_words_are_what_printf_makes_of_them() -> None:
    word = bytes(range(1, 256)) + b"\n\n"
    done = subprocess.run(["sh", "-c", 'printf %b "$1"', "sh", escaped(word)], capture_output=True, check=True)
    assert done.stdout == word


def test_cpu_percent() -> None:
    assert cpu_percent(1.0, 2.0, 2.0) == 50.0
    assert cpu_percent(2.0, 1.0, 1.0) == 0.0
    assert cpu_percent(1.0, 0.0, 1.0) is None
    assert cpu_percent(1.0, 2.0, 0.0) is None


# -- doctor ------------------------------------------------------------------------------------------------------------


def _doctor(tmp_path: Path, *words: str, **env: str) -> tuple[int, dict[str, dict[str, Any]], dict[str, Any]]:
    places = {
        "SANDBOXD_PATHS__RUN_DIR": str(tmp_path / "run"),
        "SANDBOXD_PATHS__STATE_DIR": str(tmp_path / "state"),
        "SANDBOXD_NODE__RESERVED_DISK_BYTES": "0",
    }
    done = ctl("--json", "doctor", *words, **{**places, **env})
    report = json.loads(done.stdout)
    return done.returncode, {check["name"]: check for check in report["checks"]}, report


def test_doctor_without_a_daemon_says_what_is_missing(tmp_path: Path) -> None:
    status, checks, report = _doctor(tmp_path, SANDBOXD_IMAGES__IMAGES_DIR=str(tmp_path), SANDBOXD_VMM__BINARY="/none")
    assert status == 1
    assert report["ok"] is False
    assert checks["daemon"]["status"] == "warn"
    assert checks["qemu"]["status"] == "missing"
    assert checks["image minimal"]["advice"] == "sandboxctl image build minimal"
    assert checks["run directory"]["status"] == "ok"
    assert list(tmp_path.iterdir()) == []


def test_doctor_reports_a_disk_that_is_too_full(tmp_path: Path) -> None:
    _, checks, _ = _doctor(tmp_path, SANDBOXD_NODE__RESERVED_DISK_BYTES="1000TiB")
    assert checks["free disk"]["status"] == "missing"


def test_doctor_for_people_has_a_line_for_each_check_and_no_colours(tmp_path: Path) -> None:
    done = ctl("doctor", SANDBOXD_PATHS__RUN_DIR=str(tmp_path), SANDBOXD_IMAGES__IMAGES_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert any(line.startswith("missing image minimal") for line in lines)
    assert {line.split()[0] for line in lines} <= {"ok", "warn", "missing", "->"}


def test_what_the_settings_ask_for_decides_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.cli.commands import host_checks as checks_module

    monkeypatch.setattr(checks_module, "_open_error", lambda device: "No such file or directory")
    monkeypatch.setattr("agent.daemon.vmm.qemu.vsock_backend.shutil.which", lambda *args, **kwargs: None)

    def status(name: str, **vmm: Any) -> Status:
        (found,) = [check for check in host_checks(Settings(vmm=VmmSettings(**vmm))) if check.name == name]
        return found.status

    assert status("kvm") is Status.WARN
    assert status("kvm", accelerator="tcg") is Status.OK
    assert status("kvm", accelerator="kvm") is Status.MISSING
    assert status("vhost-device-vsock") is Status.WARN
    assert status("vhost-device-vsock", link="vsock") is Status.MISSING
