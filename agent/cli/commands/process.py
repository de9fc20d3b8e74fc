"""`exec`, `attach`, `ps`, `kill` and `wait`: processes of a sandbox."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import formatting, options, output
from agent.cli.connect import connected, rpc_error
from agent.cli.errors import print_error, process_exit_status
from agent.common.api_client import Api, opened

if TYPE_CHECKING:
    from sandboxd.v1.process_pb2 import Process, ProcessSpec, SystemProcess

# Exit statuses of shells for a program that cannot be run (POSIX, Shell Command Language, 2.8.2).
_SHELL_STATUS = {"EXEC_NOT_FOUND": 127, "EXEC_NOT_EXECUTABLE": 126}
_SandboxId = Annotated[str, typer.Argument(metavar="ID", help="Sandbox id.")]
_ProcessId = Annotated[int, typer.Argument(metavar="PROCESS", help="Process id, as `ps` or `exec -d` prints it.")]


async def exec_(
    id: _SandboxId,
    argv: Annotated[list[str], typer.Argument(metavar="[--] PROGRAM [ARG]...", help="Program and its arguments.")],
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Send standard input to the program.")
    ] = False,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Run the program on a terminal.")] = False,
    user: Annotated[str, typer.Option("--user", "-u", help="User name or id. Default: sandbox.")] = "",
    cwd: Annotated[
        str, typer.Option("--workdir", "-w", metavar="DIR", help="Working directory. Default: the user's home.")
    ] = "",
    env: Annotated[
        list[str] | None,
        typer.Option("--env", "-e", metavar="KEY=VALUE", help="Set an environment variable; repeatable."),
    ] = None,
    detach_on_disconnect: Annotated[
        bool, typer.Option("--detach-on-disconnect", help="Keep the program running if this command ends first.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Start the program, print its process id and return.")
    ] = False,
) -> int:
    """Run a program in a sandbox and exit with its status.

    The status is 128+N after signal N, and 127 or 126, as in a shell, if the program cannot be run. The first Ctrl-C
    goes to the program, the second one ends this command. With -it the program has a terminal and receives every key.
    """
    from agent.cli.terminal import local_tty
    from sandboxd.v1 import process_pb2

    words = argv[1:] if argv[0] == "--" else argv
    if not words:
        raise typer.BadParameter("name a program to run", param_hint="PROGRAM")
    spec = process_pb2.ProcessSpec(argv=words, env=options.parse_pairs(env, "--env"), cwd=cwd, user=user)
    if tty:
        rows, cols = local_tty.size()
        spec.terminal.CopyFrom(process_pb2.Terminal(rows=rows, cols=cols, term=local_tty.term_type()))
    spec.stdin = process_pb2.ProcessSpec.STDIN_PIPE if interactive else process_pb2.ProcessSpec.STDIN_NULL
    import grpc

    async with connected() as api:
        try:
            if detach:
                return await _start(api, id, spec)
            return await _exec(api, id, spec, use_stdin=interactive, detach_on_disconnect=detach_on_disconnect)
        except grpc.aio.AioRpcError as error:
            failure = rpc_error(error)
            print_error(failure)
            return _SHELL_STATUS.get(failure.reason, 1)


async def _start(api: Api, sandbox_id: str, spec: ProcessSpec) -> int:
    from sandboxd.v1 import process_pb2

    process = await api.processes.StartProcess(process_pb2.StartProcessRequest(sandbox_id=sandbox_id, spec=spec))
    output.print_result(output.to_json(process), str(process.process_id))
    return 0


async def _exec(api: Api, sandbox_id: str, spec: ProcessSpec, *, use_stdin: bool, detach_on_disconnect: bool) -> int:
    from agent.cli.terminal.attached_process import AttachedProcess
    from sandboxd.v1 import process_pb2

    start = process_pb2.ExecRequest.Start(sandbox_id=sandbox_id, spec=spec, detach_on_disconnect=detach_on_disconnect)
    attached = AttachedProcess(
        api, sandbox_id, process_pb2.ExecRequest, use_stdin=use_stdin, use_terminal=spec.HasField("terminal")
    )
    return await attached.run(opened(api.processes.Exec), process_pb2.ExecRequest(start=start))


async def attach(
    id: _SandboxId,
    process: _ProcessId,
    no_replay: Annotated[bool, typer.Option("--no-replay", help="Skip earlier output.")] = False,
    no_stdin: Annotated[bool, typer.Option("--no-stdin", help="Do not send standard input.")] = False,
) -> int:
    """Attach to a running process and exit with its status.

    Print its buffered output first. The process keeps running when this command ends; on a terminal, Ctrl-] detaches.
    """
    from agent.cli.terminal import local_tty
    from agent.cli.terminal.attached_process import AttachedProcess
    from sandboxd.v1 import process_pb2

    async with connected() as api:
        known = await api.processes.ListProcesses(process_pb2.ListProcessesRequest(sandbox_id=id))
        on_terminal = any(
            one.process_id == process and one.terminal and not one.HasField("exit") for one in known.processes
        )
        attached = AttachedProcess(
            api, id, process_pb2.AttachRequest, use_stdin=not no_stdin,
            use_terminal=on_terminal and local_tty.stdin_is_tty() and not no_stdin, detachable=True,
        )  # fmt: skip
        first = process_pb2.AttachRequest.Open(sandbox_id=id, process_id=process, no_replay=no_replay)
        return await attached.run(opened(api.processes.Attach), process_pb2.AttachRequest(open=first))


async def ps(
    id: _SandboxId,
    all: Annotated[bool, typer.Option("--all", "-a", help="List every process of the guest.")] = False,
) -> None:
    """List the processes that were started through the API."""
    from sandboxd.v1 import process_pb2

    async with connected() as api:
        found = await api.processes.ListProcesses(process_pb2.ListProcessesRequest(sandbox_id=id, all_processes=all))
    if output.json_enabled():
        for message in found.system_processes if all else found.processes:
            output.print_json(output.to_json(message))
    elif all:
        headers: tuple[str, ...] = ("PID", "PPID", "UID", "S", "RSS", "CPU", "COMMAND")
        output.print_table(headers, [_system_process_row(one) for one in found.system_processes])
    else:
        headers = ("PROCESS", "PID", "USER", "AGE", "STATUS", "COMMAND")
        output.print_table(headers, [_process_row(one) for one in found.processes])


def _process_row(one: Process) -> tuple[str, ...]:
    age, status = formatting.since(one.start_time), _status(one)
    return str(one.process_id), str(one.pid), one.user, age, status, " ".join(one.argv)


def _system_process_row(one: SystemProcess) -> tuple[str, ...]:
    rss, cpu = formatting.size(one.rss_bytes), f"{one.cpu_seconds:.1f}s"
    return str(one.pid), str(one.parent_pid), str(one.uid), one.state, rss, cpu, one.command


def _status(process: Process) -> str:
    if not process.HasField("exit"):
        return "running"
    if process.exit.signal_number:
        return process.exit.signal + (" (oom)" if process.exit.oom_killed else "")
    return f"exit {process.exit.exit_code}"


async def kill(
    id: _SandboxId,
    process: _ProcessId,
    signal: Annotated[str, typer.Option("--signal", "-s", help="Signal name or number.")] = "SIGTERM",
) -> None:
    """Send a signal to a process and its process group."""
    from sandboxd.v1 import process_pb2

    async with connected() as api:
        await api.processes.SendSignal(process_pb2.SendSignalRequest(sandbox_id=id, process_id=process, signal=signal))
    if output.json_enabled():
        output.print_json({"process_id": process, "signal": signal})


async def wait(id: _SandboxId, process: _ProcessId) -> int:
    """Wait until a process exits, and exit with its status."""
    from sandboxd.v1 import process_pb2

    async with connected() as api:
        response = await api.processes.Wait(process_pb2.WaitRequest(sandbox_id=id, process_id=process))
    if output.json_enabled():
        output.print_json(output.to_json(response.exit))
    return process_exit_status(response.exit)
