"""The output of programs that run for a moment, and who waits for their end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from agent.common.errors import VmmError
from agent.daemon.host.capture import stdout_of
from agent.daemon.vmm.accelerator import AcceleratorProbe
from agent.daemon.vmm.cloud_hypervisor import binary as cloud_hypervisor
from agent.daemon.vmm.qemu.qemu_binary import find_qemu
from tests.support.children import children

pytestmark = pytest.mark.timeout(60)
# As much as may happen at once when an agent starts; one alone meets the fault now and then only.
_TOGETHER, _ROUNDS = 8, 12


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


async def test_output_and_its_end() -> None:
    async with stdout_of(["sh", "-c", "echo one; echo lost >&2; echo two"]) as output:
        assert await output.read() == b"one\ntwo\n"


@pytest.mark.parametrize("body", ["exec sleep 60", "exec yes", "exec cat /dev/zero"])
async def test_process_ends_with_the_block(body: str) -> None:
    before, files = children(), len(os.listdir("/proc/self/fd"))
    with contextlib.suppress(TimeoutError):
        async with stdout_of(["sh", "-c", body]) as output, asyncio.timeout(0.1):
            await output.read(1)
            await asyncio.sleep(60)
    await asyncio.sleep(0)  # the loop closes the pipe in its next turn
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == files


async def test_program_that_cannot_be_started() -> None:
    await asyncio.to_thread(int)  # the pool's first thread is there before the descriptors are counted
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(VmmError, match="cannot start"):
        async with stdout_of(["/no/such/program"]):
            pytest.fail("it was started")
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("kind", ["trial", "qemu", "cloud-hypervisor"])
async def test_each_child_has_one_owner(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A child that ends in the same moment in which it is killed: a second waiter finds no status and says so."""
    text = "cloud-hypervisor v53.0" if kind == "cloud-hypervisor" else "QEMU emulator version 10.0.2"
    path = script(tmp_path / kind, f"echo '{text}'")

    async def start() -> None:
        if kind == "trial":
            assert not await AcceleratorProbe(tmp_path, tmp_path, tmp_path)._boots(path)
        elif kind == "qemu":
            assert (await find_qemu(path))[1] == "10.0.2"
        else:
            assert (await cloud_hypervisor.find(path, tmp_path))[1] == "53.0"

    before = children()
    for _ in range(_ROUNDS):
        await asyncio.gather(*(start() for _ in range(_TOGETHER)))
    assert [record.getMessage() for record in caplog.records if "child" in record.getMessage()] == []
    assert children() == before
