"""`pause`, `resume` and `fork`: sandboxes that stand still, and copies of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import output, text
from agent.cli.commands.sandbox import Labels, state_word
from agent.cli.connect import connected

if TYPE_CHECKING:
    from sandboxd.v1.sandbox_pb2 import Sandbox

_Id = Annotated[str, typer.Argument(metavar="ID")]


def _show(sandbox: Sandbox) -> None:
    if output.json_wanted():
        output.emit(output.to_json(sandbox))
    else:
        output.say(f"{sandbox.id} {state_word(sandbox)}")


async def pause(
    id: _Id,
    to_disk: Annotated[bool, typer.Option("--to-disk", help="Write its memory to the disk and free it.")] = False,
) -> None:
    """Make a sandbox stand still; its processes go on with `resume`."""
    from sandboxd.v1 import sandbox_pb2

    async with connected() as api:
        _show(await api.sandboxes.PauseSandbox(sandbox_pb2.PauseSandboxRequest(id=id, to_disk=to_disk)))


async def resume(id: _Id) -> None:
    """Let a paused or suspended sandbox go on."""
    from sandboxd.v1 import sandbox_pb2

    async with connected() as api:
        _show(await api.sandboxes.ResumeSandbox(sandbox_pb2.ResumeSandboxRequest(id=id)))


async def fork(
    id: _Id,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many copies.")] = 1,
    label: Labels = None,
    lifetime: Annotated[
        float | None, typer.Option(parser=text.duration_option, metavar="TIME", help="The copies live so long, as 10m.")
    ] = None,
) -> None:
    """Make copies of a running sandbox, memory and processes included, and print their ids."""
    from sandboxd.v1 import sandbox_pb2

    request = sandbox_pb2.ForkSandboxRequest(id=id, count=count, labels=text.pairs(label or (), "--label"))
    if lifetime is not None:
        request.lifetime.duration.FromMicroseconds(round(lifetime * 1e6))
    async with connected() as api:
        made = await api.sandboxes.ForkSandbox(request)
    for sandbox in made.sandboxes:
        if output.json_wanted():
            output.emit(output.to_json(sandbox))
        else:
            output.say(sandbox.id)
