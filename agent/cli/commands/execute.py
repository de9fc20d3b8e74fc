"""`exec` and `attach`: processes with their streams on ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import output, text
from agent.cli.connect import connected, described_address
from agent.cli.errors import complain, from_rpc
from agent.common.api_client import Api, opened

if TYPE_CHECKING:
    from sandboxd.v1.process_pb2 import ProcessSpec

# A command that cannot be run, as shells number it (POSIX, Shell Command Language, 2.8.2).
_STATUS = {"EXEC_NOT_FOUND": 127, "EXEC_NOT_EXECUTABLE": 126}


async def exec_(
    id: Annotated[str, typer.Argument(metavar="ID")],
    argv: Annotated[list[str], typer.Argument(metavar="[--] PROGRAM [ARG]...")],
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Pass standard input on.")] = False,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Run it on a terminal.")] = False,
    user: Annotated[str, typer.Option("--user", "-u", help="User name or id; default: sandbox.")] = "",
    cwd: Annotated[str, typer.Option("--workdir", "-w", metavar="DIR", help="Default: the user's home.")] = "",
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="KEY=VALUE", help="Repeatable.")] = None,
    detach_on_disconnect: Annotated[
        bool, typer.Option("--detach-on-disconnect", help="Let it run on if this command ends first.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Only start it, and print its process id.")] = False,
) -> int:
    """Run a program in a sandbox; its exit status is this command's (128+N for signal N, 127 and 126 as in a shell).

    Ctrl-C goes to the program; a second one gives up. With -it it has a terminal of its own, and every key goes there.
    """
    from agent.cli.terminal import terminal
    from sandboxd.v1 import process_pb2

    words = argv[1:] if argv[0] == "--" else argv
    if not words:
        raise typer.BadParameter("name a program to run", param_hint="PROGRAM")
    spec = process_pb2.ProcessSpec(argv=words, env=text.pairs(env or (), "--env"), cwd=cwd, user=user)
    if tty:
        rows, cols = terminal.size()
        spec.terminal.CopyFrom(process_pb2.Terminal(rows=rows, cols=cols, term=terminal.name()))
    spec.stdin = process_pb2.ProcessSpec.STDIN_PIPE if interactive else process_pb2.ProcessSpec.STDIN_NULL
    import grpc

    async with connected() as api:
        try:
            if detach:
                return await _start(api, id, spec)
            return await _exec(api, id, spec, use_stdin=interactive, detach_on_disconnect=detach_on_disconnect)
        except grpc.aio.AioRpcError as error:
            failure = from_rpc(error, described_address())
            complain(failure)
            return _STATUS.get(failure.reason, 1)


async def _start(api: Api, sandbox_id: str, spec: ProcessSpec) -> int:
    from sandboxd.v1 import process_pb2

    process = await api.processes.StartProcess(process_pb2.StartProcessRequest(sandbox_id=sandbox_id, spec=spec))
    if output.json_wanted():
        output.emit(output.to_json(process))
    else:
        output.say(str(process.process_id))
    return 0


async def _exec(api: Api, sandbox_id: str, spec: ProcessSpec, *, use_stdin: bool, detach_on_disconnect: bool) -> int:
    from agent.cli.terminal.attached_process import Session
    from sandboxd.v1 import process_pb2

    start = process_pb2.ExecRequest.Start(sandbox_id=sandbox_id, spec=spec, detach_on_disconnect=detach_on_disconnect)
    session = Session(
        api, sandbox_id, process_pb2.ExecRequest, use_stdin=use_stdin, use_terminal=spec.HasField("terminal")
    )
    return await session.run(opened(api.processes.Exec), process_pb2.ExecRequest(start=start))


async def attach(
    id: Annotated[str, typer.Argument(metavar="ID")],
    process: Annotated[int, typer.Argument(metavar="PROCESS", help="As `ps` or `exec -d` print it.")],
    no_replay: Annotated[bool, typer.Option("--no-replay", help="Skip output from before now.")] = False,
    no_stdin: Annotated[bool, typer.Option("--no-stdin", help="Keep standard input to ourselves.")] = False,
) -> int:
    """Show a process that was started before: the output kept of it, then what comes, then its exit status.

    It goes on when this command ends. On a terminal, Ctrl-] leaves it.
    """
    from agent.cli.terminal import terminal
    from agent.cli.terminal.attached_process import Session
    from sandboxd.v1 import process_pb2

    async with connected() as api:
        known = await api.processes.ListProcesses(process_pb2.ListProcessesRequest(sandbox_id=id))
        on_terminal = any(
            one.process_id == process and one.terminal and not one.HasField("exit") for one in known.processes
        )
        session = Session(
            api, id, process_pb2.AttachRequest, use_stdin=not no_stdin,
            use_terminal=on_terminal and terminal.is_terminal() and not no_stdin, can_leave=True,
        )  # fmt: skip
        first = process_pb2.AttachRequest.Open(sandbox_id=id, process_id=process, no_replay=no_replay)
        return await session.run(opened(api.processes.Attach), process_pb2.AttachRequest(open=first))
