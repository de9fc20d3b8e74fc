"""`vmm install`, and the part of `doctor` on virtual machine monitors: both use the daemon's own search for them."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import output
from agent.cli.commands.host_checks import Check, Status
from agent.common.errors import AgentError

if TYPE_CHECKING:
    from agent.common.config.settings import Settings


async def install(
    sha256: Annotated[
        str, typer.Option(metavar="DIGEST", help="SHA-256 of the release binary. Default: vmm.download_sha256.")
    ] = "",
) -> None:
    """Download and install the supported Cloud Hypervisor.

    Verify the digest of the release, and install it where the daemon finds it.
    """
    from agent.common.config.loading import load
    from agent.daemon.vmm.cloud_hypervisor.install import URL
    from agent.daemon.vmm.cloud_hypervisor.install import install as download

    settings = load()
    vmm = settings.vmm
    path = await download(settings.paths.tools_dir, sha256 or vmm.download_sha256, vmm.download_url or URL)
    output.print_result({"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}, str(path))


async def vmm_checks(settings: Settings, *, probe: bool) -> AsyncIterator[Check]:
    """Yield a check for each VMM that can be installed, and with `probe` one for the VMM that the daemon would use."""
    from agent.daemon.vmm.cloud_hypervisor import binary as cloud_hypervisor
    from agent.daemon.vmm.qemu.qemu_binary import find_qemu
    from agent.daemon.vmm.select import CLOUD_HYPERVISOR, QEMU

    vmm = settings.vmm
    chosen = CLOUD_HYPERVISOR if CLOUD_HYPERVISOR in Path(vmm.binary).name else QEMU
    qemu_path, cloud_hypervisor_path = (vmm.binary if name == chosen else "" for name in (QEMU, CLOUD_HYPERVISOR))
    try:
        binary, version = await find_qemu(qemu_path)
        yield Check(QEMU, Status.OK, f"{version} at {binary}")
    except AgentError as error:
        status = Status.WARN if vmm.driver == CLOUD_HYPERVISOR else Status.MISSING
        yield Check(QEMU, status, error.message, "apt-get install qemu-system-x86")
    try:
        binary, version = await cloud_hypervisor.find(cloud_hypervisor_path, settings.paths.tools_dir)
        untested = "" if probe else "; boot a kernel to test it (--probe)"
        yield Check(CLOUD_HYPERVISOR, Status.OK, f"{version} at {binary}{untested}")
    except AgentError as error:
        status = Status.MISSING if vmm.driver == CLOUD_HYPERVISOR else Status.WARN
        yield Check(CLOUD_HYPERVISOR, status, error.message, "sandboxctl vmm install; without it, QEMU is used")
    if probe:
        yield await _probe(settings)


async def _probe(settings: Settings) -> Check:
    """Boot a kernel in the VMM that the daemon would choose, or use the stored result of an earlier boot."""
    from agent.daemon.storage.images import ImageStore
    from agent.daemon.vmm.select import choose_driver

    try:
        images = ImageStore(settings.images.images_dir)
        driver = await choose_driver(settings, images.boot_files(settings.images.default_image))
        info = await driver.probe()
    except AgentError as error:
        return Check("vmm", Status.MISSING, error.message, "set vmm.driver and vmm.accelerator to auto")
    except OSError as error:
        return Check("vmm", Status.WARN, f"cannot store the result of the probe: {error}", "run as root")
    status = Status.OK if info.accelerator == "kvm" else Status.WARN
    return Check("vmm", status, f"{info.name} {info.version} ({info.accelerator}): {info.reason}")
