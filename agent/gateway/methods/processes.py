"""The methods on processes. A process belongs to the sandbox: it goes on when its client leaves, unless that ends the
sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from agent.common.aio import quietly
from agent.common.api_client import opened, reason_of
from agent.gateway.errors import Failure, from_rpc, process_gone
from agent.gateway.jsonrpc import schema
from agent.gateway.jsonrpc.connection import Connection, method
from agent.gateway.jsonrpc.session import USER, Attachment
from agent.gateway.jsonrpc.streams import Outbound
from sandboxd.v1 import process_pb2 as pb

# The Python SDK drops output that comes before it has looked at the answer to spawn; it waits for the process then.
_HOLD_S = 1.0
HOME = "/home/sandbox"


@dataclass(eq=False)
class Child:
    """One process that was started on a connection.

    :param wanted: set once its output may be sent.
    :param on_stderr: sees what it writes to stderr.
    """

    pid: int
    process_id: int
    call: Any
    responses: AsyncIterator[pb.ExecResponse]
    stdout: Outbound | None
    stderr: Outbound | None
    on_stderr: Callable[[bytes], None] | None = None
    wanted: asyncio.Event = field(default_factory=asyncio.Event)
    exit: asyncio.Future[pb.Exit] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def describe(self) -> dict[str, object]:
        """Returns what every method that starts a process answers."""
        return {
            "pid": self.pid,
            "stdoutStreamId": self.stdout.id if self.stdout else None,
            "stderrStreamId": self.stderr.id if self.stderr else None,
        }


async def start(
    connection: Connection,
    argv: list[str],
    params: schema.Start,
    *,
    channel: bool = False,
    on_stderr: Callable[[bytes], None] | None = None,
) -> Child:
    """Starts a process. :raises Failure: :raises grpc.aio.AioRpcError: it cannot be started."""
    attachment = connection.attachment
    spec = pb.ProcessSpec(
        argv=argv, env=params.env or {}, clear_env=bool(params.clear_env), user=USER, channel=channel,
        cwd=posixpath.join(HOME, params.cwd) if params.cwd else HOME,
        stdin=pb.ProcessSpec.STDIN_NULL if params.stdin_stream_id is None else pb.ProcessSpec.STDIN_PIPE,
    )  # fmt: skip
    call = opened(attachment.api.processes.Exec)
    try:
        begin = pb.ExecRequest.Start(sandbox_id=attachment.id, spec=spec, detach_on_disconnect=True)
        await call.write(pb.ExecRequest(start=begin))
        responses = aiter(call)
        process = (await anext(responses)).process
    except BaseException:
        call.cancel()
        raise
    attachment.note_process(process.pid, process.process_id)
    stdout, stderr = (None if kind == "null" else connection.outbound() for kind in (params.stdout, params.stderr))
    child = Child(process.pid, process.process_id, call, responses, stdout, stderr, on_stderr)
    connection.children[child.pid] = child
    connection.spawn(_attend(connection, child, params.stdin_stream_id))
    return child


async def _attend(connection: Connection, child: Child, stdin_stream_id: int | None) -> None:
    """Carries a child's streams until it ends."""
    feeder = None
    if stdin_stream_id is not None:
        feeder = asyncio.create_task(_feed(connection, child, stdin_stream_id))
    try:
        await _pump(child)
    except grpc.aio.AioRpcError as error:
        await _lost(child, from_rpc(error))
    finally:
        child.call.cancel()
        if feeder is not None:
            feeder.cancel()
            await quietly(feeder)
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                connection.forget(stream)
        if connection.children.get(child.pid) is child:
            del connection.children[child.pid]
        if not child.exit.done():
            await _lost(child, Failure("Error", "the sandbox did not say how the process ended"))


async def _pump(child: Child) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_HOLD_S):
            await child.wanted.wait()
    async for response in child.responses:
        kind = response.WhichOneof("message")
        if kind == "stdout" and child.stdout is not None:
            await child.stdout.write(response.stdout)
        elif kind == "stderr":
            if child.on_stderr is not None:
                child.on_stderr(response.stderr)
            if child.stderr is not None:
                await child.stderr.write(response.stderr)
        elif kind == "exit":
            child.exit.set_result(response.exit)
            break
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            await stream.end()


async def _lost(child: Child, failure: Failure) -> None:
    if not child.exit.done():
        child.exit.set_exception(failure)
        child.exit.exception()  # retrieved: perhaps nobody waits for it
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            await stream.fail(failure)


async def _feed(connection: Connection, child: Child, stream_id: int) -> None:
    async with connection.inbound(stream_id) as source:
        # What ends the call is told by the side that reads it. A stream that its writer gave up ends the input, too.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            with contextlib.suppress(Failure):
                while data := await source.read():
                    await child.call.write(pb.ExecRequest(stdin=data))
            await child.call.write(pb.ExecRequest(stdin_eof=True))


@method("spawn", schema.Spawn)
async def spawn(connection: Connection, params: schema.Spawn) -> object:
    """Starts a program."""
    return (await start(connection, [params.command, *(params.args or [])], params)).describe()


def exit_status(ended: pb.Exit) -> dict[str, object]:
    """Returns how a process ended, as the SDKs have it."""
    code = 128 + ended.signal_number if ended.signal_number else ended.exit_code
    return {
        "success": code == 0, "code": code, "signal": ended.signal or None,
        "oom": "high-confidence" if ended.oom_killed else None,
    }  # fmt: skip


async def wait_for(connection: Connection, pid: int) -> pb.Exit:
    """Returns how a process ended, once it has. :raises Failure: there is none."""
    child = connection.children.get(pid)
    if child is not None:
        child.wanted.set()
        return await asyncio.shield(child.exit)
    attachment = connection.attachment
    request = pb.WaitRequest(sandbox_id=attachment.id, process_id=await attachment.process_id(pid))
    try:
        return (await attachment.api.processes.Wait(request)).exit
    except grpc.aio.AioRpcError as error:
        raise _gone(error, pid) from error


@method("processWait", schema.Pid)
async def wait(connection: Connection, params: schema.Pid) -> object:
    """How a process ended, once it has; as often as it is asked."""
    return exit_status(await wait_for(connection, params.pid))


async def send_signal(attachment: Attachment, pid: int, name: str) -> None:
    """Sends a signal to a process and its children. :raises Failure: it has ended, or there is no such signal."""
    request = pb.SendSignalRequest(sandbox_id=attachment.id, process_id=await attachment.process_id(pid), signal=name)
    try:
        await attachment.api.processes.SendSignal(request)
    except grpc.aio.AioRpcError as error:
        raise _gone(error, pid) from error


def _gone(error: grpc.aio.AioRpcError, pid: int) -> Failure:
    """Returns the failure of a call about a process: both SDKs know a missing one by its own."""
    missing = error.code() is grpc.StatusCode.NOT_FOUND and reason_of(error) != "SANDBOX_NOT_FOUND"
    return process_gone(pid) if missing or reason_of(error) == "PROCESS_EXITED" else from_rpc(error)


@method("processKill", schema.Kill)
async def kill(connection: Connection, params: schema.Kill) -> object:
    """Sends a signal, SIGTERM unless another is asked for."""
    await send_signal(connection.attachment, params.pid, params.signal or "SIGTERM")
    return None


@method("abort", schema.Abort)
async def abort(connection: Connection, params: schema.Abort) -> object:
    """Ends the call that was made with this id."""
    connection.abort(params.target)
    return None
