"""Starts of QEMU that fail before or with QEMU, with a script in its place: nothing is left of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from agent.common.errors import VmmError
from agent.daemon.vmm.accelerator import AcceleratorProbe
from agent.daemon.vmm.driver import LinkKind, VmmOptions, VmSpec
from agent.daemon.vmm.qemu.qemu import QemuDriver
from tests.unit.daemon.vmm.test_ch_config import spec

pytestmark = pytest.mark.timeout(30)
_MAX_SOCKET_PATH_BYTES = 107


def driver_of(directory: Path, body: str) -> QemuDriver:
    binary = directory / "qemu-system-x86_64"
    binary.write_text(f"#!/bin/sh\n[ \"$1\" = --version ] && echo 'QEMU emulator version 10.0.2' && exit\n{body}\n")
    binary.chmod(0o755)
    options = VmmOptions(binary=str(binary), accelerator="tcg")
    return QemuDriver(options, directory, AcceleratorProbe(directory, None, None))


def spec_in(run_dir: Path) -> VmSpec:
    run_dir.mkdir(mode=0o700)
    return dataclasses.replace(spec(), link=LinkKind.SERIAL, nic=None, netns=None, run_dir=run_dir, disks=())


def directory_of_length(parent: Path, length: int) -> Path:
    return parent / ("d" * (length - len(str(parent)) - 1))


async def test_a_path_that_is_too_long_for_one_of_the_sockets_leaves_none(tmp_path: Path) -> None:
    # link.sock fits, console.sock does not.
    run_dir = directory_of_length(tmp_path, _MAX_SOCKET_PATH_BYTES - len("/link.sock"))
    with pytest.raises(VmmError, match=r"choose a shorter paths\.run_dir"):
        await driver_of(tmp_path, "exit 0").start(spec_in(run_dir))
    assert list(run_dir.iterdir()) == []


async def test_the_last_output_of_a_qemu_that_ends_at_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(VmmError, match="exited with status 3 at once: no such machine") as caught:
        await driver_of(tmp_path, "echo no such machine >&2; exit 3").start(spec_in(run_dir))
    assert caught.value.reason == "VMM_NOT_STARTED"
    assert not list(run_dir.glob("*.sock"))
