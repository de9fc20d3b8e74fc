"""Settings: what an operator writes is taken, or refused with what to write instead."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest

from agent.common.config.addresses import split_address
from agent.common.config.loading import load
from agent.common.config.settings import Settings
from agent.common.errors import ConfigError
from agent.common.policy.addresses import parse_server
from agent.common.quantities import Bytes, Seconds, converted, parse_duration, parse_size


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
        ("[sandbox]\nmax_vcpus = 2.0\n", r"must be a whole number"),
        ('[sandbox]\nmax_vcpus = "two"\n', r"must be a whole number"),
        ('[sandbox]\nboot_timeout_s = "soon"\n', r"boot_timeout_s: 'soon' is not a duration; write seconds"),
        ('[node]\ncpu_overcommit = "4x"\n', r"must be a number"),
        ('[node]\nmax_sandboxes = "1GiB"\n', r"must be a whole number"),  # no size
        ('[log]\naudit = "maybe"\n', r"must be true or false"),
        ("[log]\naudit = 1\n", r"must be true or false"),
        ("[paths]\nrun_dir = 3\n", r"must be text"),
        ("[api]\nunix_allow_uids = [1.5]\n", r"must be a list of whole numbers"),
        ("[api]\nunix_allow_uids = [true]\n", r"must be a list of whole numbers"),
        ("[templates]\nprepare = 3\n", r"must be a list of whole numbers"),
        ('[templates]\nprepare = ["some"]\n', r"'some' is not a size"),
        ('[vmm]\nlink = "carrier pigeon"\n', r"vmm.link: must be one of auto, serial, vsock, not 'carrier pigeon'"),
        ("[vmm]\nlink = 3\n", r"must be one of auto, serial, vsock, not 3"),
        ('[node]\nlabels = "a=b"\n', r"must be a table of text"),
        ('[node.quotas]\nacme = "sandboxes=ten"\n', r"node.quotas.acme: 'sandboxes=ten' is not a limit; write"),
        ('[node.quotas]\nacme = "disks=1"\n', r"'disks=1' is not a limit"),
        ("[vmm]\nuid_base = 1000\n", r"vmm.uid_base is 1000; it must be 0, or from 100000 on"),
        ("[vmm]\nuid_base = 4294967000\n", r"with 65,536 users after it"),
        ('[api]\ntcp_address = "0.0.0.0:1"\n', r"mutual TLS"),
        ('[metrics]\naddress = "nine"\n', r"write host:port"),
        ("[node\n", r"not valid TOML"),
        ("[node]\nname = 3\n", r"node.name: must be text"),
        ("[node]\nlabels = {a = 3}\n", r"must be a table of text"),
        ("[egress]\nuid = 0\n", r"must not be root's"),
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


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (bool, True, True), (bool, "TRUE", True), (bool, "0", False),
        (int, 7, 7), (int, " 1_000 ", 1000), (int, 1 << 70, 1 << 70),
        (float, 2, 2.0), (float, "1.5", 1.5),
        (str, "512MiB", "512MiB"), (str, "", ""), (Path, "/a", Path("/a")),
        (Bytes, 512, 512), (Bytes, "1GiB", 1 << 30), (Seconds, 3, 3.0), (Seconds, "250ms", 0.25),
        (Literal["a", "b"], "b", "b"),
        (tuple[int, ...], "1, 2,", (1, 2)), (tuple[int, ...], [1, "2"], (1, 2)), (tuple[int, ...], "", ()),
        (tuple[str, ...], " a , b ", ("a", "b")), (tuple[str, ...], ["a ", ""], ("a",)),
        (tuple[Bytes, ...], "512MiB,1GiB", (512 << 20, 1 << 30)), (tuple[Bytes, ...], [1024, "1k"], (1024, 1024)),
        (Mapping[str, str], {"a": "512MiB"}, {"a": "512MiB"}),
    ],
)  # fmt: skip
def test_values_by_the_type_of_their_field(kind: Any, value: object, expected: object) -> None:
    found = converted(kind, value)
    assert found == expected
    assert type(found) is type(expected)


def test_the_unit_in_a_name_is_the_unit_of_its_type() -> None:
    seen = set()
    for section in dataclasses.fields(Settings):
        kinds = get_type_hints(type(getattr(Settings(), section.name)), include_extras=True)
        for name, kind in kinds.items():
            size = name.endswith(("_bytes", "bytes_per_s"))
            assert (kind == Bytes) == size, name
            assert (kind == Seconds) == (name.endswith("_s") and not name.endswith("_per_s")), name
            seen.add(name)
    assert {"bytes_per_s", "boot_timeout_s", "spool_bytes", "connections_per_s"} <= seen


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
