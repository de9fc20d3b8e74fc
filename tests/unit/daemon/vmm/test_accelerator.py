"""The choice between KVM and emulation, with scripts in QEMU's place."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from agent.common.errors import VmmError
from agent.daemon.vmm import accelerator
from agent.daemon.vmm.accelerator import AcceleratorProbe

pytestmark = pytest.mark.timeout(30)


class Bench:
    """A device that opens, a kernel, and a QEMU that does what the test says and counts its runs."""

    def __init__(self, directory: Path) -> None:
        self.cache = directory / "cache" / "deep"
        self.kernel = directory / "vmlinuz"
        self.kernel.write_text("kernel")
        self.binary = directory / "qemu"
        self.runs = directory / "runs"
        self.pid_file = directory / "pid"
        self.device = directory / "kvm"
        self.device.touch()
        self.probe = AcceleratorProbe(self.cache, self.kernel, self.kernel)

    def qemu(self, body: str) -> None:
        self.binary.write_text(f'#!/bin/sh\necho "$@" >> {self.runs}\necho $$ > {self.pid_file}\n{body}\n')
        self.binary.chmod(0o755)

    def count(self) -> int:
        return len(self.runs.read_text().splitlines()) if self.runs.exists() else 0

    def qemu_is_gone(self) -> bool:
        return not os.path.exists(f"/proc/{self.pid_file.read_text().strip()}")

    def caches(self) -> list[Path]:
        return sorted(self.cache.iterdir())

    async def choose(self, wanted: str = "auto", version: str = "10.0.0") -> tuple[str, str]:
        return await self.probe.choose(wanted, str(self.binary), version)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench(tmp_path)
    monkeypatch.setattr(accelerator, "_KVM", str(bench.device))
    return bench


BOOTS = "printf '[    0.9] Run /init as '; printf 'init process\\r\\n'; exec sleep 60"


async def test_a_kernel_that_boots_means_kvm_and_is_tried_once(bench: Bench) -> None:
    bench.qemu(BOOTS)
    assert (await bench.choose())[0] == "kvm"
    assert bench.qemu_is_gone()
    assert (await bench.choose())[0] == "kvm"
    assert (await AcceleratorProbe(bench.cache, bench.kernel, bench.kernel).choose("auto", "none", "10.0.0"))[
        0
    ] == "kvm"
    assert bench.count() == 1
    words = bench.runs.read_text()
    assert f"-accel kvm -cpu host -m 256M -kernel {bench.kernel} -initrd {bench.kernel}" in words


@pytest.mark.parametrize(
    "body",
    ["exec sleep 60", "exec yes 'no marker here'", "echo 'kvm: error'; exit 1",
     "echo 'Run /init as'; echo ' init process'", "exec cat /dev/zero"],
    ids=["hangs", "prints for ever", "ends", "similar words", "no lines"],
)  # fmt: skip
async def test_a_kernel_that_does_not_boot_means_tcg(bench: Bench, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr(accelerator, "_DEADLINE_S", 0.2)
    bench.qemu(body)
    chosen, reason = await bench.choose()
    assert chosen == "tcg"
    assert "does not reach its first program" in reason
    assert bench.qemu_is_gone()
    assert (await bench.choose()) == (chosen, reason)
    assert bench.count() == 1


async def test_a_flood_behind_the_marker_does_not_hold_up_the_end(bench: Bench) -> None:
    bench.qemu("echo 'Run /init as init process'; exec yes")
    assert (await bench.choose())[0] == "kvm"
    assert bench.qemu_is_gone()


async def test_another_kernel_or_version_is_tried_again(bench: Bench) -> None:
    bench.qemu(BOOTS)
    await bench.choose()
    await bench.choose(version="10.0.1")
    bench.kernel.write_text("another kernel")
    await bench.choose()
    assert bench.count() == 3
    assert len(bench.caches()) == 3


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "[]", "7", "null", '"x"', '{"accelerator": "tgc", "reason": ""}', '{"accelerator": "tcg"}']
)
async def test_a_broken_verdict_is_tried_again(bench: Bench, text: str) -> None:
    bench.qemu(BOOTS)
    await bench.choose()
    (cache,) = bench.caches()
    cache.write_text(text)
    assert (await bench.choose())[0] == "kvm"
    assert bench.count() == 2
    assert json.loads(cache.read_text())["accelerator"] == "kvm"
    assert bench.caches() == [cache]


async def test_what_is_demanded_is_not_tried(bench: Bench) -> None:
    assert (await bench.choose("kvm"))[0] == "kvm"
    assert (await bench.choose("tcg"))[0] == "tcg"
    assert bench.count() == 0


async def test_without_the_device(bench: Bench) -> None:
    bench.device.unlink()
    with pytest.raises(VmmError) as caught:
        await bench.choose("kvm")
    assert caught.value.reason == "KVM_MISSING"
    assert (await bench.choose("tcg"))[0] == "tcg"
    chosen, reason = await bench.choose()
    assert (chosen, "missing" in reason) == ("tcg", True)


async def test_without_an_image(bench: Bench) -> None:
    bench.qemu(BOOTS)
    for kernel, initramfs in ((None, None), (bench.kernel, None), (bench.binary / "none", bench.kernel)):
        chosen, reason = await AcceleratorProbe(bench.cache, kernel, initramfs).choose("auto", str(bench.binary), "1")
        assert (chosen, "no image yet" in reason) == ("tcg", True)
    assert bench.count() == 0
    assert not bench.cache.exists()
