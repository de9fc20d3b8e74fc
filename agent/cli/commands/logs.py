"""`logs`: the serial console of a sandbox."""

from __future__ import annotations

import codecs
import sys
from typing import Annotated

import typer

from agent.cli import output, text
from agent.cli.connect import connected


async def logs(
    id: Annotated[str, typer.Argument(metavar="ID")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the sandbox is gone.")] = False,
    tail: Annotated[
        int | None, typer.Option(parser=text.size_option, metavar="BYTES", help="At most the last so many bytes.")
    ] = None,
) -> None:
    """Print the console. On a terminal without control characters: a guest chooses them."""
    from agent.cli.terminal.stdio import Output
    from sandboxd.v1 import sandbox_pb2

    if tail == 0:
        return
    sink, shown = Output(sys.stdout.fileno()), sys.stdout.isatty()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    request = sandbox_pb2.GetConsoleRequest(id=id, follow=follow, tail_bytes=tail or 0)
    async with connected() as api:
        async for piece in api.sandboxes.GetConsole(request):
            if output.json_wanted():
                output.emit(output.to_json(piece))
            elif shown:
                await sink.write(text.printable_lines(decoder.decode(piece.data)).encode())
            else:
                await sink.write(piece.data)
