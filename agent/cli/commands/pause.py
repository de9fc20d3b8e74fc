"""`pause`, `resume` and `fork`: stop and continue a sandbox's VM, and copy a running one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import formatting, options, output
from agent.cli.commands.sandbox import Labels, SandboxId
from agent.cli.connect import connected

if TYPE_CHECKING:
    from sandboxd.v1.sandbox_pb2 import Sandbox


def _show(sandbox: Sandbox) -> None:
    output.print_result(output.to_json(sandbox), f"{sandbox.id} {formatting.enum_field(sandbox, 'state')}")


async def pause(
    id: SandboxId,
    to_disk: Annotated[bool, typer.Option("--to-disk", help="Write the memory to disk and free it (suspend).")] = False,
) -> None:
    """Pause a sandbox: stop its CPUs until `resume`."""
    from sandboxd.v1 import sandbox_pb2

    async with connected() as api:
        _show(await api.sandboxes.PauseSandbox(sandbox_pb2.PauseSandboxRequest(id=id, to_disk=to_disk)))


async def resume(id: SandboxId) -> None:
    """Resume a paused or suspended sandbox."""
    from sandboxd.v1 import sandbox_pb2

    async with connected() as api:
        _show(await api.sandboxes.ResumeSandbox(sandbox_pb2.ResumeSandboxRequest(id=id)))


async def fork(
    id: SandboxId,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of copies.")] = 1,
    label: Labels = None,
    lifetime: Annotated[
        float | None,
        typer.Option(parser=options.parse_duration, metavar="TIME", help="Delete the copies after TIME, such as 10m."),
    ] = None,
) -> None:
    """Copy a running sandbox with its memory and processes.

    Print the ids of the copies.
    """
    from sandboxd.v1 import sandbox_pb2

    request = sandbox_pb2.ForkSandboxRequest(id=id, count=count, labels=options.parse_pairs(label, "--label"))
    if lifetime is not None:
        request.lifetime.duration.FromMicroseconds(round(lifetime * 1e6))
    async with connected() as api:
        made = await api.sandboxes.ForkSandbox(request)
    for sandbox in made.sandboxes:
        output.print_result(output.to_json(sandbox), sandbox.id)
