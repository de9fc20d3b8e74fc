"""`logs` and `events`: the console output of a sandbox, and the state changes of all sandboxes."""

from __future__ import annotations

import codecs
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import formatting, options, output
from agent.cli.connect import connected

if TYPE_CHECKING:
    from sandboxd.v1.sandbox_pb2 import SandboxEvent


async def logs(
    id: Annotated[str, typer.Argument(metavar="ID", help="Sandbox id.")],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new output until the sandbox is deleted.")
    ] = False,
    tail: Annotated[
        int | None, typer.Option(parser=options.parse_size, metavar="BYTES", help="Print only the last BYTES bytes.")
    ] = None,
) -> None:
    """Print the serial console of a sandbox.

    On a terminal, leave out control characters, since the guest chooses them.
    """
    from agent.cli.stdio import Writer
    from sandboxd.v1 import sandbox_pb2

    if tail == 0:
        return
    writer, on_terminal = Writer(sys.stdout.fileno()), sys.stdout.isatty()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    request = sandbox_pb2.GetConsoleRequest(id=id, follow=follow, tail_bytes=tail or 0)
    async with connected() as api:
        async for piece in api.sandboxes.GetConsole(request):
            if output.json_enabled():
                output.print_json(output.to_json(piece))
            elif on_terminal:
                await writer.write(formatting.printable_lines(decoder.decode(piece.data)).encode())
            else:
                await writer.write(piece.data)


async def events(
    id: Annotated[
        str, typer.Argument(metavar="[ID]", help="Sandbox id. Default: all sandboxes.", show_default=False)
    ] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new events until Ctrl-C.")] = False,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", metavar="KEY[=VALUE]", help="Only sandboxes with this label; repeatable."),
    ] = None,
) -> None:
    """Print the existing sandboxes; with -f, every later event.

    The fields of a line are time, sandbox id, type, state and reason.
    """
    from sandboxd.v1 import sandbox_pb2

    labels = options.parse_pairs(label, "--label", value_needed=False)
    async with connected() as api:
        async for event in api.sandboxes.WatchSandboxes(sandbox_pb2.WatchSandboxesRequest(id=id, labels=labels)):
            if event.type == sandbox_pb2.SandboxEvent.TYPE_SYNCED:
                if not follow:
                    return
                continue
            output.print_result(output.to_json(event), _event_line(event))


def _event_line(event: SandboxEvent) -> str:
    reason = event.reason
    if event.HasField("denial"):
        reason = f"{reason}: {event.denial.count} x {event.denial.host or '-'}:{event.denial.port}"
    moment = event.time.ToDatetime().isoformat(timespec="milliseconds")
    state = formatting.enum_field(event.sandbox, "state")
    return f"{moment}Z {event.sandbox.id} {formatting.enum_field(event, 'type')} {state} {reason}".rstrip()
