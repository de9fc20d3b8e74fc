"""`ps`, `kill`, `wait`: processes that run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import output, text
from agent.cli.connect import connected
from agent.cli.errors import exit_status

if TYPE_CHECKING:
    from sandboxd.v1.process_pb2 import ListProcessesResponse, Process


async def ps(
    id: Annotated[str, typer.Argument(metavar="ID")],
    all: Annotated[bool, typer.Option("--all", "-a", help="Every process of the guest.")] = False,
) -> None:
    """List the processes that were started through the API."""
    from sandboxd.v1 import process_pb2

    async with connected() as api:
        found = await api.processes.ListProcesses(process_pb2.ListProcessesRequest(sandbox_id=id, all_processes=all))
    if output.json_wanted():
        for message in found.system_processes if all else found.processes:
            output.emit(output.to_json(message))
    elif all:
        _print_table_of_guest(found)
    else:
        rows = [
            (
                str(one.process_id),
                str(one.pid),
                one.user,
                output.since(one.start_time),
                _status(one),
                " ".join(one.argv),
            )
            for one in found.processes
        ]
        output.print_table(("PROCESS", "PID", "USER", "AGE", "STATUS", "COMMAND"), rows)


def _print_table_of_guest(found: ListProcessesResponse) -> None:
    rows = [
        (
            str(one.pid), str(one.parent_pid), str(one.uid), one.state, text.size(one.rss_bytes),
            f"{one.cpu_seconds:.1f}s", one.command,
        )
        for one in found.system_processes
    ]  # fmt: skip
    output.print_table(("PID", "PPID", "UID", "S", "RSS", "CPU", "COMMAND"), rows)


def _status(process: Process) -> str:
    if not process.HasField("exit"):
        return "running"
    if process.exit.signal_number:
        return process.exit.signal + (" (oom)" if process.exit.oom_killed else "")
    return f"exit {process.exit.exit_code}"


async def kill(
    id: Annotated[str, typer.Argument(metavar="ID")],
    process: Annotated[int, typer.Argument(metavar="PROCESS")],
    signal: Annotated[str, typer.Option("--signal", "-s", help="Name or number.")] = "SIGTERM",
) -> None:
    """Send a signal to a process and its group."""
    from sandboxd.v1 import process_pb2

    async with connected() as api:
        await api.processes.SendSignal(process_pb2.SendSignalRequest(sandbox_id=id, process_id=process, signal=signal))
    if output.json_wanted():
        output.emit({"process_id": process, "signal": signal})


async def wait(
    id: Annotated[str, typer.Argument(metavar="ID")],
    process: Annotated[int, typer.Argument(metavar="PROCESS")],
) -> int:
    """Wait until a process has exited; its exit status is this command's."""
    from sandboxd.v1 import process_pb2

    async with connected() as api:
        answer = await api.processes.Wait(process_pb2.WaitRequest(sandbox_id=id, process_id=process))
    if output.json_wanted():
        output.emit(output.to_json(answer.exit))
    return exit_status(answer.exit)
