"""Which VMM is used: by what is there and boots, with scripts in the programs' place."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from agent.common.config.daemon import PathSettings, VmmSettings
from agent.common.config.settings import Settings
from agent.common.errors import VmmError
from agent.daemon.vmm.driver import LinkKind, VmmInfo
from agent.daemon.vmm.select import choose_driver

BOOTS = "echo 'Run /init as init process'"
HANGS = "echo nothing"


def script(path: Path, version: str, otherwise: str = HANGS) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; else {otherwise}; fi\n')
    path.chmod(0o755)
    return path


class Host:
    """A host with QEMU, and with whatever else a test puts there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tools = directory / "tools"
        for name in ("kernel", "initramfs"):
            (directory / name).touch()
        self.boot_files: tuple[Path, Path] | None = (directory / "kernel", directory / "initramfs")

    def install(self, version: str = "cloud-hypervisor v53.0", otherwise: str = BOOTS) -> Path:
        return script(self.tools / "cloud-hypervisor", version, otherwise)

    async def choose(self, **vmm: Any) -> VmmInfo:
        paths = PathSettings(cache_dir=self.directory / "cache", tools_dir=self.tools)
        settings = dataclasses.replace(Settings(), paths=paths, vmm=VmmSettings(**vmm))
        return await (await choose_driver(settings, self.boot_files)).probe()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr("agent.daemon.vmm.accelerator._KVM", "/dev/null")  # any device that opens: nothing uses it here
    script(tmp_path / "bin" / "qemu-system-x86_64", "QEMU emulator version 10.0.2")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.defpath}")
    return Host(tmp_path)


async def test_cloud_hypervisor_where_it_boots_a_guest(host: Host) -> None:
    host.install()
    info = await host.choose()
    assert (info.name, info.accelerator, info.link, info.can_snapshot) == (
        "cloud-hypervisor", "kvm", LinkKind.VSOCK, True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("version", "otherwise", "why"),
    [
        ("", "", "not cloud-hypervisor: cloud-hypervisor is neither in PATH nor in"),
        ("cloud-hypervisor v53.0", HANGS, "a guest kernel does not reach its first program"),
        ("cloud-hypervisor v52.0", BOOTS, "v53"),
    ],
)
async def test_qemu_where_it_does_not_and_why(host: Host, version: str, otherwise: str, why: str) -> None:
    if version:
        host.install(version, otherwise)
    info = await host.choose()
    assert (info.name, info.link, info.can_snapshot) == ("qemu", LinkKind.SERIAL, True)
    assert "not cloud-hypervisor: " in info.reason
    assert why in info.reason


async def test_qemu_before_there_is_an_image(host: Host) -> None:
    host.install()
    host.boot_files = None
    assert (await host.choose()).name == "qemu"


@pytest.mark.parametrize(("key", "value"), [("accelerator", "tcg"), ("link", "serial"), ("driver", "qemu")])
async def test_settings_that_mean_qemu(host: Host, key: str, value: str) -> None:
    host.install()
    info = await host.choose(**{key: value})
    assert info.name == "qemu"
    assert ("not cloud-hypervisor" in info.reason) is (key != "driver")


async def test_a_program_by_its_name(host: Host) -> None:
    mine = script(host.directory / "mine" / "cloud-hypervisor-static", "cloud-hypervisor v53.0", BOOTS)
    assert (await host.choose(binary=str(mine))).name == "cloud-hypervisor"
    other = script(host.directory / "mine" / "qemu", "QEMU emulator version 9.1.0")
    assert (await host.choose(binary=str(other))).version == "9.1.0"


async def test_a_demand_that_cannot_be_met_is_refused(host: Host) -> None:
    with pytest.raises(VmmError, match="sandboxctl vmm install"):
        await host.choose(driver="cloud-hypervisor")
    host.install(otherwise=HANGS)
    with pytest.raises(VmmError, match="KVM only"):
        await host.choose(driver="cloud-hypervisor")
    host.install()
    with pytest.raises(VmmError, match=r"set vmm\.link"):
        await host.choose(driver="cloud-hypervisor", link="serial")


async def test_qemu_over_vsock_cannot_be_frozen(host: Host) -> None:
    info = await host.choose(driver="qemu", link="vsock")
    assert (info.link, info.can_snapshot) == (LinkKind.VSOCK, False)


async def test_a_program_that_boots_nothing_does_not_stand_in_for_qemu(host: Host) -> None:
    mine = script(host.directory / "mine" / "cloud-hypervisor", "cloud-hypervisor v53.0", HANGS)
    info = await host.choose(binary=str(mine))
    assert (info.name, info.version) == ("qemu", "10.0.2")
    assert "a guest kernel does not reach its first program" in info.reason
