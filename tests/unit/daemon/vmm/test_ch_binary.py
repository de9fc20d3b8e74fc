"""Which cloud-hypervisor is used and how it is confined, with scripts in its place."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from agent.common.errors import VmmError
from agent.daemon.host import process as host_process
from agent.daemon.host.process import Confinement
from agent.daemon.vmm.cloud_hypervisor import binary

pytestmark = pytest.mark.timeout(30)
NONE = Path("/none")


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return tmp_path / "cloud-hypervisor"


@pytest.mark.parametrize(
    ("text", "version"), [("v53.0", "53.0"), ("53.0.0", "53.0.0"), ("v53.1-3-gabcdef-dirty", "53.1")]
)
async def test_the_version_that_it_says(program: Path, text: str, version: str) -> None:
    path = script(program, f"echo 'cloud-hypervisor {text}'; echo 'Migration Protocol Versions: 0'")
    assert await binary.find(path, NONE) == (path, version)


async def test_tools_then_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, other = tmp_path / "tools", tmp_path / "bin"
    monkeypatch.setenv("PATH", str(other))
    with pytest.raises(VmmError, match="neither in PATH nor in") as caught:
        await binary.find("", tools)
    assert caught.value.reason == "VMM_MISSING"
    for directory in (other, tools):
        directory.mkdir()
        path = script(directory / "cloud-hypervisor", "echo cloud-hypervisor v53.0")
        assert await binary.find("", tools) == (path, "53.0")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("echo cloud-hypervisor v52.0", "drives v53 only"),
        ("echo cloud-hypervisor v54.0", "drives v53 only"),
        ("echo cloud-hypervisor v530.0", "drives v53 only"),
        ("echo hello 53.0", "does not say"),
        ("exit 1", "does not say"),
        ("exec yes", "does not say"),
    ],
)
async def test_a_program_of_no_use(program: Path, body: str, text: str) -> None:
    with pytest.raises(VmmError, match=text) as caught:
        await binary.find(script(program, body), NONE)
    assert caught.value.reason == "VMM_UNSUPPORTED"


async def test_a_program_that_cannot_be_run(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (str(program), "/etc/passwd"):
        with pytest.raises(VmmError, match="cannot be run"):
            await binary.find(path, NONE)
    monkeypatch.setattr(binary, "_TIMEOUT_S", 0.1)
    with pytest.raises(VmmError, match="cannot be run"):
        await binary.find(script(program, "exec sleep 60"), NONE)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await binary.find(str(program), NONE)


# -- confinement -------------------------------------------------------------------------------------------------------


def test_the_words_of_confinement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setpriv = script(tmp_path / "setpriv", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert Confinement().argv(["a", "b"]) == [setpriv, "--no-new-privs", "--", "a", "b"]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    none = ["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]
    assert Confinement().argv(["a"]) == [setpriv, "--no-new-privs", *none, "--", "a"]
    assert Confinement(7, 8).argv(["a"])[5:] == ["--reuid=7", "--regid=8", "--clear-groups", "--", "a"]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(VmmError, match="util-linux"):
        Confinement().argv(["a"])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize(
    ("confinement", "ids"),
    [(Confinement(), ("0", "0", {"0"})), (Confinement(64123, 64124), ("64123", "64124", set()))],
)
async def test_what_is_confined_has_no_power(
    confinement: Confinement, ids: tuple[str, str, set[str]], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    process = await host_process.spawn(confinement.argv(["cat", "/proc/self/status"]), netns=None, stderr_path=log)
    assert (await process.wait()).exit_code == 0
    facts = dict(line.split(":\t", 1) for line in log.read_text().splitlines() if ":\t" in line)
    assert facts["Uid"].split() == [ids[0]] * 4
    assert facts["Gid"].split() == [ids[1]] * 4
    if confinement.uid is not None:
        assert set(facts["Groups"].split()) == ids[2]
    assert facts["NoNewPrivs"] == "1"
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(facts[name], 16) == 0


async def test_output_goes_where_it_is_told(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        process = await host_process.spawn(
            [sys.executable, "-c", "import sys; print('out'); sys.exit('err')"],
            netns=None, stderr_path=tmp_path / "err", output_fds=(out.fileno(), err.fileno()),
        )  # fmt: skip
        ended = await process.wait()
    assert (ended.exit_code, ended.stderr_tail) == (1, "err")
    assert (tmp_path / "out").read_text() == "out\n"
