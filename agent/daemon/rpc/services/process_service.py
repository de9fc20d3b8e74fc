"""Serve ProcessService (process.proto). Each frame of the guest link becomes one message; nothing is buffered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from agent.common.aio import cancel_and_wait
from agent.common.errors import AgentError, GuestUnreachable, InvalidSpec
from agent.common.telemetry import PROCESSES, STREAM_BYTES
from agent.daemon.guestlink.stream import CallStream
from agent.daemon.rpc.convert.guest_values import guest_dict, guest_int, guest_list, guest_text
from agent.daemon.rpc.convert.process_messages import exit_message, process_message, system_process_message
from agent.daemon.rpc.services.streams import events, first_message, recv_or_fail
from agent.daemon.sandbox.service import SandboxService
from agent.daemon.sandbox.state.validation import check_env
from guest.wire import Frame
from sandboxd.v1 import process_pb2 as pb
from sandboxd.v1 import process_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
_CALL_TIMEOUT_S = 30.0
_MAX_ARGS = 4096
_MAX_ARG_BYTES = 1 << 20
_MAX_REPLAY_BYTES = 16 << 20
_OUT = STREAM_BYTES.labels("process", "from_guest")
_IN = STREAM_BYTES.labels("process", "to_guest")


def _size(terminal: pb.Terminal) -> dict[str, object]:
    rows, cols = terminal.rows or 24, terminal.cols or 80
    if not (1 <= rows <= 65535 and 1 <= cols <= 65535):
        raise InvalidSpec(f"terminal size is {rows} rows and {cols} columns; each must be from 1 to 65535")
    return {"rows": rows, "cols": cols}


def _text(value: str, name: str, limit: int = 4096) -> str | None:
    if "\0" in value or len(value) > limit:
        raise InvalidSpec(f"{name} has a NUL character or is over {limit} characters long")
    return value or None


def process_params(spec: pb.ProcessSpec) -> dict[str, object]:
    """Return the parameters of the guest's operation for a process specification.

    :raises InvalidSpec: it is beyond the limits of process.proto.
    """
    argv = list(spec.argv)
    if not 1 <= len(argv) <= _MAX_ARGS or not argv[0]:
        raise InvalidSpec(f"argv has {len(argv)} words; give a program and at most {_MAX_ARGS - 1} arguments")
    if sum(len(word.encode()) + 1 for word in argv) > _MAX_ARG_BYTES or any("\0" in word for word in argv):
        raise InvalidSpec(
            f"argv is over {_MAX_ARG_BYTES} bytes or has a NUL character; pass the data by standard input or a file"
        )
    check_env(spec.env)
    if not 0 <= spec.replay_bytes <= _MAX_REPLAY_BYTES:
        raise InvalidSpec(f"replay_bytes is {spec.replay_bytes}; it must be from 0 to {_MAX_REPLAY_BYTES}")
    tty: dict[str, object] | None = None
    if spec.HasField("terminal"):
        tty = {**_size(spec.terminal), "term": _text(spec.terminal.term, "term", 64)}
    return {
        "argv": argv, "env": dict(spec.env), "cwd": _text(spec.cwd, "cwd"), "user": _text(spec.user, "user", 64),
        "tty": tty, "stdin": "pipe" if spec.stdin == pb.ProcessSpec.STDIN_PIPE else "null", "replay": spec.replay_bytes,
        "clear_env": spec.clear_env, "channel": spec.channel,
    }  # fmt: skip


class ProcessServicer(process_pb2_grpc.ProcessServiceServicer):
    """Servicer of ProcessService, over the links to the guests."""

    def __init__(self, sandboxes: SandboxService) -> None:
        self._sandboxes = sandboxes

    async def _call(self, sandbox_id: str, op: str, /, **params: object) -> dict[str, Any]:
        channel = self._sandboxes.channel(sandbox_id)
        return await channel.call(op, timeout_s=_CALL_TIMEOUT_S, **params)

    async def StartProcess(self, request: pb.StartProcessRequest, context: Context) -> pb.Process:  # noqa: N802
        """See process.proto."""
        started = await self._call(request.sandbox_id, "proc.start", **process_params(request.spec))
        PROCESSES.inc()
        return process_message(started)

    async def Exec(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.ExecRequest], context: Context
    ) -> AsyncIterator[pb.ExecResponse]:
        """See process.proto."""
        first = await first_message(request_iterator, "start")
        params = process_params(first.start.spec)
        channel = self._sandboxes.channel(first.start.sandbox_id)
        detach = first.start.detach_on_disconnect
        async with channel.stream("proc.exec", detach=detach, **params) as stream:
            PROCESSES.inc()
            async for response in _relay(stream, request_iterator, pb.ExecResponse, end_is_eof=not detach):
                yield response

    async def Attach(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: Context
    ) -> AsyncIterator[pb.AttachResponse]:
        """See process.proto."""
        first = await first_message(request_iterator, "open")
        channel = self._sandboxes.channel(first.open.sandbox_id)
        replay = not first.open.no_replay
        async with channel.stream("proc.attach", id=first.open.process_id, replay=replay) as stream:
            async for response in _relay(stream, request_iterator, pb.AttachResponse, end_is_eof=False):
                yield response

    async def SendSignal(self, request: pb.SendSignalRequest, context: Context) -> pb.SendSignalResponse:  # noqa: N802
        """See process.proto."""
        await self._call(request.sandbox_id, "proc.signal", id=request.process_id, signal=request.signal)
        return pb.SendSignalResponse()

    async def ResizeTerminal(  # noqa: N802
        self, request: pb.ResizeTerminalRequest, context: Context
    ) -> pb.ResizeTerminalResponse:
        """See process.proto."""
        await self._call(request.sandbox_id, "proc.resize", id=request.process_id, **_size(request.size))
        return pb.ResizeTerminalResponse()

    async def Wait(self, request: pb.WaitRequest, context: Context) -> pb.WaitResponse:  # noqa: N802
        """See process.proto."""
        channel = self._sandboxes.channel(request.sandbox_id)
        result = await channel.call("proc.wait", timeout_s=None, id=request.process_id)
        return pb.WaitResponse(exit=exit_message(guest_dict(result, "exit")))

    async def ListProcesses(  # noqa: N802
        self, request: pb.ListProcessesRequest, context: Context
    ) -> pb.ListProcessesResponse:
        """See process.proto."""
        channel = self._sandboxes.channel(request.sandbox_id)
        response = pb.ListProcessesResponse()
        async for page in events(channel.stream("proc.list")):
            response.processes.extend(process_message(item) for item in guest_list(page, "processes"))
        if request.all_processes:
            async for page in events(channel.stream("sys.processes")):
                items = guest_list(page, "processes")
                response.system_processes.extend(system_process_message(item) for item in items)
        return response

    async def GetEnvironment(  # noqa: N802
        self, request: pb.GetEnvironmentRequest, context: Context
    ) -> pb.Environment:
        """See process.proto."""
        result = await self._call(request.sandbox_id, "proc.env", user=_text(request.user, "user", 64))
        variables = guest_dict(result, "env")
        return pb.Environment(variables={name: guest_text(variables, name) for name in variables})

    async def UpdateEnvironment(  # noqa: N802
        self, request: pb.UpdateEnvironmentRequest, context: Context
    ) -> pb.UpdateEnvironmentResponse:
        """See process.proto."""
        check_env(request.set)
        check_env(dict.fromkeys(request.remove, ""))
        await self._call(request.sandbox_id, "proc.setenv", set=dict(request.set), remove=sorted(set(request.remove)))
        return pb.UpdateEnvironmentResponse()


async def _relay(
    stream: CallStream,
    requests: AsyncIterator[pb.ExecRequest] | AsyncIterator[pb.AttachRequest],
    response: type[pb.ExecResponse] | type[pb.AttachResponse],
    *,
    end_is_eof: bool,
) -> AsyncIterator[Any]:
    """Send the client's messages to the guest, and yield the guest's frames as messages."""
    feeder = asyncio.create_task(_feed(stream, requests, end_is_eof=end_is_eof))
    try:
        while (frame := await recv_or_fail(stream, feeder)) is not None:
            kind, value = frame
            if kind is Frame.STDOUT:
                _OUT.inc(len(value))
                yield response(stdout=value)
            elif kind is Frame.STDERR:
                _OUT.inc(len(value))
                yield response(stderr=value)
            elif kind is Frame.EVENT:
                yield _started(value, response)
            elif kind is Frame.RESULT:
                yield response(exit=exit_message(guest_dict(value, "exit")))
    finally:
        await cancel_and_wait(feeder)


def _started(value: dict[str, Any], response: type[pb.ExecResponse] | type[pb.AttachResponse]) -> Any:
    message = response(process=process_message(guest_dict(value, "process")))
    if isinstance(message, pb.AttachResponse):
        message.dropped_bytes = guest_int(value, "dropped")
    return message


async def _feed(
    stream: CallStream, requests: AsyncIterator[pb.ExecRequest] | AsyncIterator[pb.AttachRequest], *, end_is_eof: bool
) -> None:
    """Send the client's messages to the guest.

    :param end_is_eof: close the process's standard input when the client's stream ends. False for processes that
        outlive their clients: gRPC reports a client that disconnected in the same way.
    :raises AgentError: a message is not valid; the guest's call is ended first.
    """
    ended = False
    try:
        async for request in requests:
            kind = request.WhichOneof("message")
            if kind == "stdin" and not ended:
                _IN.inc(len(request.stdin))
                await stream.send(Frame.DATA, request.stdin)
            elif kind == "stdin_eof":
                ended = True
                await stream.send_eof()
            elif kind == "resize":
                await stream.send_json({"resize": _size(request.resize)})
            elif kind == "signal":
                await stream.send_json({"signal": request.signal[:32]})
        if end_is_eof and not ended:
            await stream.send_eof()
    except GuestUnreachable:
        return  # recv_or_fail reports it
    except AgentError:
        stream.end()
        raise
