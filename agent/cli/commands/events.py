"""`events`: what happens to sandboxes."""

from __future__ import annotations

from typing import Annotated

import typer

from agent.cli import output, text
from agent.cli.commands.sandbox import state_word
from agent.cli.connect import connected


async def events(
    id: Annotated[str, typer.Argument(metavar="[ID]", show_default=False)] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", metavar="KEY[=VALUE]", help="Only those with it; repeatable.")
    ] = None,
) -> None:
    """Print what sandboxes there are, and with -f every change: time, id, what happened, state, why."""
    from sandboxd.v1 import sandbox_pb2

    labels = text.pairs(label or (), "--label", value_needed=False)
    async with connected() as api:
        async for event in api.sandboxes.WatchSandboxes(sandbox_pb2.WatchSandboxesRequest(id=id, labels=labels)):
            if event.type == sandbox_pb2.SandboxEvent.TYPE_SYNCED:
                if not follow:
                    return
                continue
            if output.json_wanted():
                output.emit(output.to_json(event))
                continue
            what = output.enum_word(event.DESCRIPTOR.fields_by_name["type"].enum_type, event.type)
            why = event.reason
            if event.HasField("denial"):
                why = f"{why}: {event.denial.count} x {event.denial.host or '-'}:{event.denial.port}"
            moment = event.time.ToDatetime().isoformat(timespec="milliseconds")
            output.say(f"{moment}Z {event.sandbox.id} {what} {state_word(event.sandbox)} {why}".rstrip())
