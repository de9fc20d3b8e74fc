"""Process that was started on a connection: relay its input and output until it exits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from agent.gateway.errors import CallError
from agent.gateway.jsonrpc.streams import InboundStream, OutboundStream
from sandboxd.v1 import process_pb2 as pb

# The Python SDK drops output that arrives before it has handled the response to spawn. Its next call, processWait,
# shows that it has; a client that never waits gets the output after this time.
_OUTPUT_DELAY_S = 1.0


@dataclass(eq=False)
class ChildProcess:
    """One process.

    :param call: the Exec call. `responses` iterates over its messages, the first of which has been read.
    :param stdout: stream to the client, or None if the output is dropped; `stderr` likewise.
    :param on_stderr: called with each piece of stderr.
    """

    pid: int
    process_id: int
    call: Any
    responses: AsyncIterator[pb.ExecResponse]
    stdout: OutboundStream | None
    stderr: OutboundStream | None
    on_stderr: Callable[[bytes], None] | None = None
    output_requested: asyncio.Event = field(default_factory=asyncio.Event)
    exit: asyncio.Future[pb.Exit] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def to_json(self) -> dict[str, object]:
        """Return the result of a method that starts a process."""
        return {
            "pid": self.pid,
            "stdoutStreamId": self.stdout.id if self.stdout else None,
            "stderrStreamId": self.stderr.id if self.stderr else None,
        }

    @property
    def streams(self) -> list[OutboundStream]:
        """Streams to the client."""
        return [stream for stream in (self.stdout, self.stderr) if stream is not None]

    async def relay_output(self) -> None:
        """Relay stdout and stderr until the process exits; set `exit`.

        :raises grpc.aio.AioRpcError: the call failed; `exit` is not set.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_OUTPUT_DELAY_S):
                await self.output_requested.wait()
        async for response in self.responses:
            kind = response.WhichOneof("message")
            if kind == "stdout" and self.stdout is not None:
                await self.stdout.write(response.stdout)
            elif kind == "stderr":
                if self.on_stderr is not None:
                    self.on_stderr(response.stderr)
                if self.stderr is not None:
                    await self.stderr.write(response.stderr)
            elif kind == "exit":
                self.exit.set_result(response.exit)
                break
        for stream in self.streams:
            await stream.end()

    async def relay_input(self, source: InboundStream) -> None:
        """Relay a client's stream to stdin. An error of the stream ends stdin like its regular end."""
        # `relay_output` reports how the call ended.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            with contextlib.suppress(CallError):
                while data := await source.read():
                    await self.call.write(pb.ExecRequest(stdin=data))
            await self.call.write(pb.ExecRequest(stdin_eof=True))

    async def fail(self, error: CallError) -> None:
        """Fail `exit`, unless it is set, and the streams."""
        if not self.exit.done():
            self.exit.set_exception(error)
            self.exit.exception()  # marks it as retrieved: perhaps no call waits for the exit
        for stream in self.streams:
            await stream.fail(error)
