"""Select the VMM of this node: Cloud Hypervisor where it really boots a guest, QEMU everywhere else."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

from agent.common.config.settings import Settings
from agent.common.errors import AgentError, VmmError
from agent.daemon.storage.images import ImageStore
from agent.daemon.vmm.accelerator import AcceleratorProbe, Trial, qemu_trial
from agent.daemon.vmm.cloud_hypervisor import binary
from agent.daemon.vmm.cloud_hypervisor.cloud_hypervisor import CloudHypervisorDriver, trial
from agent.daemon.vmm.driver import Driver, VmmOptions
from agent.daemon.vmm.qemu.qemu import QemuDriver

QEMU, CLOUD_HYPERVISOR = "qemu", binary.NAME


async def choose_driver(settings: Settings, images: ImageStore) -> Driver:
    """Return the driver that `vmm.driver` names; with "auto" the best one that works on this host.

    `VmmInfo.reason` of the driver's `probe` says why it was chosen.
    """
    options = VmmOptions(binary=settings.vmm.binary, accelerator=settings.vmm.accelerator, link=settings.vmm.link)
    wanted = settings.vmm.driver
    if wanted == CLOUD_HYPERVISOR:
        return await _cloud_hypervisor(settings, images, options)
    if wanted == QEMU:
        return await _qemu(settings, images, options)
    why_not = _excluded_by_settings(settings)
    if not why_not:
        try:
            driver: Driver = await _cloud_hypervisor(settings, images, options)
            await driver.probe()
        except VmmError as error:
            why_not = error.message
        else:
            return driver
    # A binary named cloud-hypervisor is not QEMU.
    program = "" if CLOUD_HYPERVISOR in Path(options.binary).name else options.binary
    options = dataclasses.replace(options, binary=program, note=f"not {CLOUD_HYPERVISOR}: {why_not}")
    return await _qemu(settings, images, options)


def _excluded_by_settings(settings: Settings) -> str:
    """Return why the settings alone exclude Cloud Hypervisor; "" if they do not."""
    vmm = settings.vmm
    if vmm.binary and CLOUD_HYPERVISOR not in Path(vmm.binary).name:
        return f"vmm.binary is {vmm.binary}"
    if vmm.accelerator == "tcg":
        return "vmm.accelerator is tcg"
    if vmm.link == "serial":
        return "vmm.link is serial"
    return ""


async def _cloud_hypervisor(settings: Settings, images: ImageStore, options: VmmOptions) -> CloudHypervisorDriver:
    probe = await asyncio.to_thread(_probe, settings, images, trial)
    return CloudHypervisorDriver(options, settings.paths.tools_dir, probe)


async def _qemu(settings: Settings, images: ImageStore, options: VmmOptions) -> QemuDriver:
    probe = await asyncio.to_thread(_probe, settings, images, qemu_trial)
    return QemuDriver(options, settings.paths.tools_dir, probe)


def _probe(settings: Settings, images: ImageStore, trial_argv: Trial) -> AcceleratorProbe:
    try:
        image = images.get(settings.images.default_image)
    except AgentError:
        return AcceleratorProbe(settings.paths.cache_dir, None, None, trial_argv)
    return AcceleratorProbe(settings.paths.cache_dir, image.kernel.path, image.initramfs.path, trial_argv)
