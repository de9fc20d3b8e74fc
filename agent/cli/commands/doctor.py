"""`doctor`: what this host has and lacks, what will be used, and what to do. Works without a daemon."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import output, text
from agent.cli.commands.host_checks import Check, Status, host_checks, nearest
from agent.cli.connect import address, connected
from agent.cli.errors import START_IT, CliError
from agent.common.errors import AgentError

if TYPE_CHECKING:
    from agent.common.config.settings import Settings

_DAEMON_TIMEOUT_S = 5.0
_WIDTHS = (8, 20)


async def doctor(
    probe: Annotated[
        bool, typer.Option("--probe", help="Boot a kernel to see whether KVM works, or show what came of it before.")
    ] = False,
) -> int:
    """Say what this host has, lacks, and what will be used. Ends with 1 if something needed is missing."""
    from agent.common.config.loading import load

    settings = load()
    found = []
    async for check in _checks(settings, probe=probe):
        found.append(check)
        if not output.json_wanted():
            _print(check)
    lacking = [check for check in found if check.status is Status.MISSING]
    if output.json_wanted():
        output.emit({"ok": not lacking, "checks": [check.to_json() for check in found]})
    return 1 if lacking else 0


def _print(check: Check) -> None:
    from sys import stdout

    word = check.status.value.ljust(_WIDTHS[0])
    if stdout.isatty():
        colour = {Status.OK: 32, Status.WARN: 33, Status.MISSING: 31}[check.status]
        stdout.write(f"\x1b[{colour}m{word}\x1b[0m")
    else:
        stdout.write(word)
    output.say(f"{check.name.ljust(_WIDTHS[1])}{check.detail}")
    if check.advice:
        output.say(f"{' ' * sum(_WIDTHS)}-> {check.advice}")


async def _checks(settings: Settings, *, probe: bool) -> AsyncIterator[Check]:
    for check in host_checks(settings):
        yield check
    async for check in _vmm_checks(settings, probe=probe):
        yield check
    for check in _image_checks(settings):
        yield check
    for check in _place_checks(settings):
        yield check
    for check in await _daemon_checks():
        yield check


async def _vmm_checks(settings: Settings, *, probe: bool) -> AsyncIterator[Check]:
    # The daemon's own search, so that both say the same. A client of a remote node never comes here.
    from agent.daemon.vmm.cloud_hypervisor import binary as cloud_hypervisor
    from agent.daemon.vmm.qemu.qemu_binary import find_qemu
    from agent.daemon.vmm.select import CLOUD_HYPERVISOR, QEMU

    vmm = settings.vmm
    chosen = CLOUD_HYPERVISOR if CLOUD_HYPERVISOR in Path(vmm.binary).name else QEMU
    of_qemu, of_other = (vmm.binary if name == chosen else "" for name in (QEMU, CLOUD_HYPERVISOR))
    try:
        binary, version = await find_qemu(of_qemu)
        yield Check(QEMU, Status.OK, f"{version} at {binary}")
    except AgentError as error:
        status = Status.WARN if vmm.driver == CLOUD_HYPERVISOR else Status.MISSING
        yield Check(QEMU, status, error.message, "apt-get install qemu-system-x86")
    try:
        binary, version = await cloud_hypervisor.find(of_other, settings.paths.tools_dir)
        known = "" if probe else "; whether a kernel boots in it, only a boot says (--probe)"
        yield Check(CLOUD_HYPERVISOR, Status.OK, f"{version} at {binary}{known}")
    except AgentError as error:
        status = Status.MISSING if vmm.driver == CLOUD_HYPERVISOR else Status.WARN
        yield Check(CLOUD_HYPERVISOR, status, error.message, "sandboxctl vmm install; without it, QEMU is used")
    if probe:
        yield await _verdict(settings)


async def _verdict(settings: Settings) -> Check:
    from agent.daemon.storage.images import ImageStore
    from agent.daemon.vmm.select import choose_driver

    try:
        driver = await choose_driver(settings, ImageStore(settings.images.images_dir))
        info = await driver.probe()
    except AgentError as error:
        return Check("vmm", Status.MISSING, error.message, "set vmm.driver and vmm.accelerator to auto")
    except OSError as error:
        return Check("vmm", Status.WARN, f"cannot keep a verdict: {error}", "run as root")
    status = Status.OK if info.accelerator == "kvm" else Status.WARN
    return Check("vmm", status, f"{info.name} {info.version} ({info.accelerator}): {info.reason}")


def _image_checks(settings: Settings) -> list[Check]:
    from agent.daemon.storage.images import ImageStore

    folder, wanted = settings.images.images_dir, settings.images.default_image
    store = ImageStore(folder)
    checks = []
    for name in store.names():
        try:
            image = store.get(name)
        except AgentError as error:
            checks.append(Check(f"image {name}", Status.WARN, error.message))
        else:
            detail = f"{text.size(image.size_bytes)}, kernel {image.kernel_version}"
            checks.append(Check(f"image {name}", Status.OK, detail))
    if not any(check.name == f"image {wanted}" and check.status is Status.OK for check in checks):
        checks.append(
            Check(
                f"image {wanted}",
                Status.MISSING,
                f"the default image is not in {folder}",
                f"sandboxctl image build {wanted}",
            )
        )
    return checks


def _place_checks(settings: Settings) -> list[Check]:
    """Directories that the daemon writes to, and the room there."""
    checks = []
    for name, path in (("run directory", settings.paths.run_dir), ("state directory", settings.paths.state_dir)):
        place = nearest(path)
        if os.access(place, os.W_OK | os.X_OK):
            checks.append(Check(name, Status.OK, f"{path} {'is writable' if place == path else 'can be made'}"))
        else:
            status = Status.MISSING if os.geteuid() == 0 else Status.WARN
            checks.append(Check(name, status, f"this user cannot write {path}", "run as root, or set paths.*"))
    place = nearest(settings.paths.state_dir)
    free, reserve = shutil.disk_usage(place).free, settings.node.reserved_disk_bytes
    if free < reserve:
        detail = f"{text.size(free)} free in {place}, less than node.reserved_disk_bytes ({text.size(reserve)})"
        checks.append(Check("free disk", Status.MISSING, detail, "free space: sandboxes are refused until then"))
    else:
        checks.append(Check("free disk", Status.OK, f"{text.size(free)} in {place}, {text.size(reserve)} is kept free"))
    return checks


async def _daemon_checks() -> list[Check]:
    import grpc

    from sandboxd.v1 import node_pb2

    try:
        async with connected() as api:
            node = await api.nodes.GetNode(node_pb2.GetNodeRequest(), timeout=_DAEMON_TIMEOUT_S)
    except CliError as error:
        return [Check("daemon", Status.WARN, error.message.removesuffix(f": {START_IT}"), START_IT)]
    except grpc.aio.AioRpcError as error:
        detail = f"no answer at {address()}: {error.details() or error.code().name}"
        return [Check("daemon", Status.WARN, detail, START_IT)]
    used = f"{node.vmm} {node.vmm_version} with {node.accelerator}: {node.vmm_reason}"
    return [
        Check("daemon", Status.OK, f"sandboxd {node.version} at {address()}, {used}"),
        *(Check("degraded", Status.WARN, sentence, "see docs/operations.md") for sentence in node.degraded),
    ]
