"""`doctor`: checks of this host and its daemon, each with advice. Works without a daemon."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import formatting, output
from agent.cli.commands.host_checks import Check, Status, existing_ancestor, host_checks
from agent.cli.commands.vmm import vmm_checks
from agent.cli.connect import address, connected
from agent.cli.errors import START_DAEMON, CliError
from agent.common.errors import AgentError

if TYPE_CHECKING:
    from agent.common.config.settings import Settings

_DAEMON_TIMEOUT_S = 5.0
_WIDTHS = (8, 20)


async def doctor(
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Boot a kernel to test KVM and the VMM, or show the result of an earlier boot."),
    ] = False,
) -> int:
    """Check this host and its daemon, and advise what to do. Exit with 1 if something required is missing."""
    from agent.common.config.loading import load

    settings = load()
    found = []
    async for check in _checks(settings, probe=probe):
        found.append(check)
        if not output.json_enabled():
            _print(check)
    ok = all(check.status is not Status.MISSING for check in found)
    if output.json_enabled():
        output.print_json({"ok": ok, "checks": [check.to_json() for check in found]})
    return 0 if ok else 1


def _print(check: Check) -> None:
    from sys import stdout

    word = check.status.value.ljust(_WIDTHS[0])
    if stdout.isatty():
        colour = {Status.OK: 32, Status.WARN: 33, Status.MISSING: 31}[check.status]
        stdout.write(f"\x1b[{colour}m{word}\x1b[0m")
    else:
        stdout.write(word)
    output.print_line(f"{check.name.ljust(_WIDTHS[1])}{check.detail}")
    if check.advice:
        output.print_line(f"{' ' * sum(_WIDTHS)}-> {check.advice}")


async def _checks(settings: Settings, *, probe: bool) -> AsyncIterator[Check]:
    for check in host_checks(settings):
        yield check
    async for check in vmm_checks(settings, probe=probe):
        yield check
    for check in _image_checks(settings):
        yield check
    for check in _directory_checks(settings):
        yield check
    yield _disk_check(settings)
    for check in await _daemon_checks():
        yield check


def _image_checks(settings: Settings) -> list[Check]:
    from agent.daemon.storage.images import ImageStore

    directory, wanted = settings.images.images_dir, settings.images.default_image
    store = ImageStore(directory)
    checks = []
    for name in store.names():
        try:
            image = store.get(name)
        except AgentError as error:
            checks.append(Check(f"image {name}", Status.WARN, error.message))
        else:
            detail = f"{formatting.size(image.size_bytes)}, kernel {image.kernel_version}"
            checks.append(Check(f"image {name}", Status.OK, detail))
    if not any(check.name == f"image {wanted}" and check.status is Status.OK for check in checks):
        detail, advice = f"the default image is not in {directory}", f"sandboxctl image build {wanted}"
        checks.append(Check(f"image {wanted}", Status.MISSING, detail, advice))
    return checks


def _directory_checks(settings: Settings) -> list[Check]:
    """Check that this user can write the daemon's directories, or create them."""
    checks = []
    for name, path in (("run directory", settings.paths.run_dir), ("state directory", settings.paths.state_dir)):
        existing = existing_ancestor(path)
        if os.access(existing, os.W_OK | os.X_OK):
            state = "is writable" if existing == path else "can be created"
            checks.append(Check(name, Status.OK, f"{path} {state}"))
        else:
            status = Status.MISSING if os.geteuid() == 0 else Status.WARN
            checks.append(Check(name, status, f"this user cannot write {path}", "run as root, or set paths.*"))
    return checks


def _disk_check(settings: Settings) -> Check:
    directory = existing_ancestor(settings.paths.state_dir)
    free_bytes, reserve_bytes = shutil.disk_usage(directory).free, settings.node.reserved_disk_bytes
    free, reserve = formatting.size(free_bytes), formatting.size(reserve_bytes)
    if free_bytes < reserve_bytes:
        detail = f"{free} free in {directory}, less than node.reserved_disk_bytes ({reserve})"
        return Check("free disk", Status.MISSING, detail, "free space: creates are refused until then")
    return Check("free disk", Status.OK, f"{free} in {directory}, of which {reserve} are reserved")


async def _daemon_checks() -> list[Check]:
    import grpc

    from sandboxd.v1 import node_pb2

    try:
        async with connected() as api:
            node = await api.nodes.GetNode(node_pb2.GetNodeRequest(), timeout=_DAEMON_TIMEOUT_S)
    except CliError as error:
        return [Check("daemon", Status.WARN, error.message.removesuffix(f": {START_DAEMON}"), START_DAEMON)]
    except grpc.aio.AioRpcError as error:
        detail = f"no answer at {address()}: {error.details() or error.code().name}"
        return [Check("daemon", Status.WARN, detail, START_DAEMON)]
    used = f"{node.vmm} {node.vmm_version} with {node.accelerator}: {node.vmm_reason}"
    return [
        Check("daemon", Status.OK, f"sandboxd {node.version} at {address()}, {used}"),
        *(Check("degraded", Status.WARN, sentence, "see docs/operations.md") for sentence in node.degraded),
    ]
