"""Addresses of the daemon, and what TCP needs."""

from __future__ import annotations

import pytest

from agent.cli import connect, options
from agent.cli.errors import CliError
from tests.unit.cli.command import ctl


@pytest.fixture(autouse=True)
def _fresh_options() -> None:
    options.set_current(options.Options())


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
