"""Settings: what an operator writes is taken, or refused with what to write instead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agent.common.config.settings import ConfigError, load, split_address
from agent.common.policy.addresses import parse_server
from agent.common.quantities import parse_duration, parse_size


def write(directory: Path, text: str) -> Path:
    path = directory / "config.toml"
    path.write_text(text)
    return path


def test_file_and_environment_the_environment_wins(tmp_path: Path) -> None:
    text = '[sandbox]\ndefault_memory_bytes = "1GiB"\nboot_timeout_s = "2m"\n[node]\nlabels = {a = "b"}\n'
    environ = {"SANDBOXD_SANDBOX__BOOT_TIMEOUT_S": "5s", "SANDBOXD_API__UNIX_ALLOW_UIDS": "1,2", "HOME": "/"}
    settings = load(write(tmp_path, text), environ)
    assert settings.sandbox.default_memory_bytes == 1 << 30
    assert settings.sandbox.boot_timeout_s == 5.0
    assert settings.api.unix_allow_uids == (1, 2)
    assert settings.node.labels == {"a": "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sandbx]\n", r"unknown section sandbx; did you mean sandbox\?"),
        ("[sandbox]\nboot_timeout = 1\n", r"unknown key sandbox.boot_timeout; did you mean sandbox.boot_timeout_s\?"),
        ("[sandbox]\nzzz = 1\n", r"there are: default_vcpus, max_vcpus"),
        ("sandbox = 3\n", r"must be a table: write \[sandbox\]"),
        ('[sandbox]\nmax_memory_bytes = "lots"\n', r"max_memory_bytes: 'lots' is not a size; write bytes"),
        ("[sandbox]\nmax_vcpus = -1\n", r"sandbox.max_vcpus must not be negative"),
        ("[sandbox]\nmax_vcpus = true\n", r"must not be true or false"),
        ("[sandbox]\nmax_vcpus = 1.5\n", r"must be a whole number"),
        ('[vmm]\nlink = "carrier pigeon"\n', r"must be one of auto, serial, vsock"),
        ('[node.quotas]\nacme = "sandboxes=ten"\n', r"node.quotas.acme: 'sandboxes=ten' is no limit; write"),
        ('[node.quotas]\nacme = "disks=1"\n', r"'disks=1' is no limit"),
        ("[vmm]\nuid_base = 1000\n", r"vmm.uid_base is 1000; it must be 0, or from 100000 on"),
        ("[vmm]\nuid_base = 4294967000\n", r"with 65,536 users after it"),
        ('[api]\ntcp_address = "0.0.0.0:1"\n', r"mutual TLS"),
        ('[metrics]\naddress = "nine"\n', r"write host:port"),
        ("[node\n", r"not valid TOML"),
        ("[node]\nname = 3\n", r"node.name: must be text"),
        ("[node]\nlabels = {a = 3}\n", r"must be a table of text"),
        ("[egress]\nuid = 0\n", r"that are not root's"),
        ('[egress]\ndeny = ["https://a.example"]\n', r"egress.deny: .* without scheme"),
        ('[egress]\nalways = "a.example:99999"\n', r"egress.always: .*port"),
        ('[egress.tenants]\nacme = "*"\n', r"egress.tenants.acme: .*leave the list out"),
        ('[egress]\npermit_private = ["10.0.0.0/99"]\n', r"egress.permit_private: .*10.1.0.0/16"),
        ('[egress]\npool_ipv4 = "fd00::/64"\n', r"must be a range of IPv4"),
        ('[egress]\nresolvers = ["resolver.example"]\n', r"egress.resolvers: .*192.0.2.1:53"),
        ('[egress]\nresolvers = ["192.0.2.1:0"]\n', r"has no valid port"),
        ("[egress]\nresolvers = [3]\n", r"must be a list of text"),
    ],
)
def test_wrong_settings_are_refused_with_advice(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, text), {})


def test_unknown_keys_of_the_environment_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"did you mean log.level\?"):
        load(None, {"SANDBOXD_LOG__LEVLE": "debug"})


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        load(tmp_path / "none.toml", {})


@pytest.mark.parametrize(("text", "value"), [("1024", 1024), ("4G", 4 << 30), ("512MiB", 512 << 20), ("8 kb", 8192)])
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize(("text", "value"), [("1.5", 1.5), ("250ms", 0.25), ("2h", 7200.0), ("1d", 86400.0)])
def test_durations(text: str, value: float) -> None:
    assert parse_duration(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1.5GiB", "1 2"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_servers() -> None:
    for text, server in (
        ("192.0.2.1", ("192.0.2.1", 53)), ("192.0.2.1:5353", ("192.0.2.1", 5353)), ("2001:db8::1", ("2001:db8::1", 53)),
        ("[2001:db8::1]:54", ("2001:db8::1", 54)), ("[2001:db8::1]", ("2001:db8::1", 53)),
    ):  # fmt: skip
        assert parse_server(text) == server


def test_addresses() -> None:
    assert split_address("[::1]:80", "x") == ("::1", 80)
    assert split_address("", "x") == ("", 0)
    with pytest.raises(ConfigError):
        split_address("host:99999", "x")


@pytest.mark.parametrize(("text", "status"), [("", 0), ("[nod]\n", 2)])
def test_check_tells_by_its_status(tmp_path: Path, text: str, status: int) -> None:
    command = [sys.executable, "-m", "agent.daemon", "--check", "--config", str(write(tmp_path, text))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == status
    assert done.stderr == ("" if status == 0 else "sandboxd: unknown section nod; did you mean node?\n")
