"""Select the VMM of this node: Cloud Hypervisor where it really boots a guest, QEMU everywhere else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from agent.common.config.settings import Settings
from agent.common.errors import VmmError
from agent.daemon.vmm.accelerator import AcceleratorProbe, Trial, qemu_trial
from agent.daemon.vmm.cloud_hypervisor import binary
from agent.daemon.vmm.cloud_hypervisor.cloud_hypervisor import CloudHypervisorDriver, trial
from agent.daemon.vmm.driver import Driver, VmmOptions
from agent.daemon.vmm.qemu.qemu import QemuDriver

BootFiles = tuple[Path, Path]  # kernel, initramfs
QEMU, CLOUD_HYPERVISOR = "qemu", binary.NAME


async def choose_driver(settings: Settings, boot_files: BootFiles | None) -> Driver:
    """Return the driver that `vmm.driver` names; with "auto" the best one that works on this host.

    :param boot_files: files of the image that a trial of the accelerator boots; None: no trial, hence "tcg".

    `VmmInfo.reason` of the driver's `probe` says why it was chosen.
    """
    options = VmmOptions(binary=settings.vmm.binary, accelerator=settings.vmm.accelerator, link=settings.vmm.link)
    wanted = settings.vmm.driver
    if wanted == CLOUD_HYPERVISOR:
        return _cloud_hypervisor(settings, boot_files, options)
    if wanted == QEMU:
        return _qemu(settings, boot_files, options)
    why_not = _excluded_by_settings(settings)
    if not why_not:
        try:
            driver: Driver = _cloud_hypervisor(settings, boot_files, options)
            await driver.probe()
        except VmmError as error:
            why_not = error.message
        else:
            return driver
    # A binary named cloud-hypervisor is not QEMU.
    program = "" if CLOUD_HYPERVISOR in Path(options.binary).name else options.binary
    options = dataclasses.replace(options, binary=program, note=f"not {CLOUD_HYPERVISOR}: {why_not}")
    return _qemu(settings, boot_files, options)


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


def _cloud_hypervisor(settings: Settings, boot_files: BootFiles | None, options: VmmOptions) -> CloudHypervisorDriver:
    return CloudHypervisorDriver(options, settings.paths.tools_dir, _probe(settings, boot_files, trial))


def _qemu(settings: Settings, boot_files: BootFiles | None, options: VmmOptions) -> QemuDriver:
    return QemuDriver(options, settings.paths.tools_dir, _probe(settings, boot_files, qemu_trial))


def _probe(settings: Settings, boot_files: BootFiles | None, trial_argv: Trial) -> AcceleratorProbe:
    kernel, initramfs = boot_files or (None, None)
    return AcceleratorProbe(settings.paths.cache_dir, kernel, initramfs, trial_argv)
