"""Methods on processes and on the environment that later processes start with.

A process belongs to the sandbox: it survives its client's connection, unless the sandbox ends with the connection.
"""

from __future__ import annotations

import asyncio
import posixpath
from collections.abc import Callable

import grpc

from agent.common.aio import cancel_and_wait
from agent.common.api_client import opened, reason_of
from agent.common.model import DEFAULT_USER
from agent.gateway.errors import CallError, call_error_from_rpc, process_gone
from agent.gateway.jsonrpc.child_process import ChildProcess
from agent.gateway.jsonrpc.connection import RpcConnection
from agent.gateway.methods.params import process_params
from agent.gateway.methods.params.common import NoParams
from agent.gateway.sandboxes.session import Session
from sandboxd.v1 import process_pb2 as pb

_HOME = "/home/sandbox"
_SIGNAL_EXIT_BASE = 128  # exit code of a process that a signal ended, as in shells


async def start_process(
    connection: RpcConnection,
    argv: list[str],
    params: process_params.StartProcess,
    *,
    channel: bool = False,
    on_stderr: Callable[[bytes], None] | None = None,
) -> ChildProcess:
    """Start a process and relay its streams in the background.

    :param channel: give the process a channel on descriptor 3, see `GuestStream.channel`.
    :param on_stderr: called with each piece of stderr.
    :raises grpc.aio.AioRpcError: the process cannot be started.
    """
    session = connection.session
    spec = pb.ProcessSpec(
        argv=argv, env=params.env or {}, clear_env=bool(params.clear_env), user=DEFAULT_USER, channel=channel,
        cwd=posixpath.join(_HOME, params.cwd) if params.cwd else _HOME,
        stdin=pb.ProcessSpec.STDIN_NULL if params.stdin_stream_id is None else pb.ProcessSpec.STDIN_PIPE,
    )  # fmt: skip
    call = opened(session.api.processes.Exec)
    try:
        start = pb.ExecRequest.Start(sandbox_id=session.sandbox_id, spec=spec, detach_on_disconnect=True)
        await call.write(pb.ExecRequest(start=start))
        responses = aiter(call)
        process = (await anext(responses)).process
    except BaseException:
        call.cancel()
        raise
    session.remember_process(process.pid, process.process_id)
    stdout, stderr = (
        None if mode == "null" else connection.streams.outbound() for mode in (params.stdout, params.stderr)
    )
    child = ChildProcess(process.pid, process.process_id, call, responses, stdout, stderr, on_stderr)
    connection.children[child.pid] = child
    connection.spawn(_relay(connection, child, params.stdin_stream_id))
    return child


async def _relay(connection: RpcConnection, child: ChildProcess, stdin_stream_id: int | None) -> None:
    input_task = None
    if stdin_stream_id is not None:
        input_task = asyncio.create_task(_relay_input(connection, child, stdin_stream_id))
    try:
        await child.relay_output()
    except grpc.aio.AioRpcError as error:
        await child.fail(call_error_from_rpc(error))
    finally:
        child.call.cancel()
        if input_task is not None:
            await cancel_and_wait(input_task)
        for stream in child.streams:
            connection.streams.remove(stream)
        if connection.children.get(child.pid) is child:
            del connection.children[child.pid]
        if not child.exit.done():
            await child.fail(CallError("Error", "the sandbox did not report how the process ended"))


async def _relay_input(connection: RpcConnection, child: ChildProcess, stream_id: int) -> None:
    async with connection.streams.inbound(stream_id) as source:
        await child.relay_input(source)


async def spawn(connection: RpcConnection, params: process_params.Spawn) -> object:
    """Start a program."""
    return (await start_process(connection, [params.command, *(params.args or [])], params)).to_json()


def exit_status(ended: pb.Exit) -> dict[str, object]:
    """Return an exit status in the SDKs' form."""
    code = _SIGNAL_EXIT_BASE + ended.signal_number if ended.signal_number else ended.exit_code
    return {
        "success": code == 0, "code": code, "signal": ended.signal or None,
        "oom": "high-confidence" if ended.oom_killed else None,
    }  # fmt: skip


async def wait_for_exit(connection: RpcConnection, pid: int) -> pb.Exit:
    """Wait until a process exits, and return how; also for a process that has exited already.

    :raises CallError: there is no such process, or its exit is unknown.
    """
    child = connection.children.get(pid)
    if child is not None:
        child.output_requested.set()
        return await asyncio.shield(child.exit)
    session = connection.session
    request = pb.WaitRequest(sandbox_id=session.sandbox_id, process_id=await session.process_id(pid))
    try:
        return (await session.api.processes.Wait(request)).exit
    except grpc.aio.AioRpcError as error:
        raise _process_error(error, pid) from error


async def wait(connection: RpcConnection, params: process_params.Pid) -> object:
    """Wait until a process exits, and return its exit status."""
    return exit_status(await wait_for_exit(connection, params.pid))


async def send_signal(session: Session, pid: int, name: str) -> None:
    """Send a signal to a process and its children.

    :raises CallError: the process has exited, or the signal is unknown.
    """
    request = pb.SendSignalRequest(sandbox_id=session.sandbox_id, process_id=await session.process_id(pid), signal=name)
    try:
        await session.api.processes.SendSignal(request)
    except grpc.aio.AioRpcError as error:
        raise _process_error(error, pid) from error


def _process_error(error: grpc.aio.AioRpcError, pid: int) -> CallError:
    """Return the error of a failed call on a process; both SDKs recognize `process_gone`."""
    missing = error.code() is grpc.StatusCode.NOT_FOUND and reason_of(error) != "SANDBOX_NOT_FOUND"
    return process_gone(pid) if missing or reason_of(error) == "PROCESS_EXITED" else call_error_from_rpc(error)


async def kill(connection: RpcConnection, params: process_params.Kill) -> object:
    """Send a signal to a process, SIGTERM by default."""
    await send_signal(connection.session, params.pid, params.signal or "SIGTERM")
    return None


async def abort(connection: RpcConnection, params: process_params.Abort) -> object:
    """End the running call with this abort id."""
    connection.abort(params.target)
    return None


# -- environment -------------------------------------------------------------------------------------------------------


async def _variables(connection: RpcConnection) -> dict[str, str]:
    request = pb.GetEnvironmentRequest(sandbox_id=connection.session.sandbox_id, user=DEFAULT_USER)
    return dict((await connection.session.api.processes.GetEnvironment(request)).variables)


async def env_get(connection: RpcConnection, params: process_params.EnvKey) -> object:
    """Return the value of a variable, or null."""
    return (await _variables(connection)).get(params.key)


async def env_to_object(connection: RpcConnection, params: NoParams) -> object:  # noqa: ARG001  of all handlers
    """Return all variables."""
    return await _variables(connection)


async def env_set(connection: RpcConnection, params: process_params.EnvKeyValue) -> object:
    """Set a variable."""
    sandbox_id, variables = connection.session.sandbox_id, {params.key: params.value}
    request = pb.UpdateEnvironmentRequest(sandbox_id=sandbox_id, set=variables)
    await connection.session.api.processes.UpdateEnvironment(request)
    return None


async def env_delete(connection: RpcConnection, params: process_params.EnvKey) -> object:
    """Remove a variable."""
    request = pb.UpdateEnvironmentRequest(sandbox_id=connection.session.sandbox_id, remove=[params.key])
    await connection.session.api.processes.UpdateEnvironment(request)
    return None
