"""Which QEMU is used, with scripts in its place."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent.common.errors import VmmError
from agent.daemon.vmm.qemu import qemu_binary
from agent.daemon.vmm.qemu.qemu_binary import find_qemu

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    return tmp_path / "qemu-system-x86_64"


def script(binary: Path, body: str) -> str:
    binary.write_text(f"#!/bin/sh\n{body}\n")
    binary.chmod(0o755)
    return str(binary)


async def test_the_version_that_it_says(binary: Path) -> None:
    path = script(binary, "echo 'QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)'")
    assert await find_qemu(path) == (path, "10.0.2")


async def test_the_path_is_searched(binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(binary.parent))
    with pytest.raises(VmmError, match="not installed") as caught:
        await find_qemu("")
    assert caught.value.reason == "VMM_MISSING"
    path = script(binary, "echo version 8.2.0")
    assert await find_qemu("") == (path, "8.2.0")


@pytest.mark.parametrize(
    ("body", "reason", "text"),
    [("echo version 8.1.9", "VMM_UNSUPPORTED", "8.2 or newer"), ("echo hello", "VMM_UNSUPPORTED", "does not say"),
     ("exit 1", "VMM_UNSUPPORTED", "does not say")],
)  # fmt: skip
async def test_a_qemu_of_no_use(binary: Path, body: str, reason: str, text: str) -> None:
    with pytest.raises(VmmError, match=text) as caught:
        await find_qemu(script(binary, body))
    assert caught.value.reason == reason


async def test_a_file_that_is_no_program(binary: Path) -> None:
    for path in (str(binary), "/etc/passwd"):
        with pytest.raises(VmmError, match="cannot be run") as caught:
            await find_qemu(path)
        assert caught.value.reason == "VMM_MISSING"


@pytest.mark.parametrize("body", ["exec sleep 60", "exec yes"])
async def test_a_qemu_that_does_not_end_is_ended(binary: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr(qemu_binary, "_VERSION_TIMEOUT_S", 0.1)
    with pytest.raises(VmmError, match="cannot be run"):
        await find_qemu(script(binary, body))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await find_qemu(str(binary))
