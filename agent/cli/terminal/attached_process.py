"""A process of a sandbox attached to the local standard streams: bytes, signals, terminal size, exit status."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from typing import TYPE_CHECKING, Any

from agent.cli import output, stdio
from agent.cli.errors import EXIT_INTERRUPTED, CliError, process_exit_status
from agent.cli.terminal import local_tty
from agent.common.aio import TaskSet
from agent.common.api_client import Api

if TYPE_CHECKING:
    from sandboxd.v1.process_pb2 import Exit

_DETACH_KEY = 0x1D  # Ctrl-], as in telnet(1)


class AttachedProcess:
    """Connects one Exec or Attach call with the standard streams.

    :param message: the class ExecRequest or AttachRequest.
    :param use_stdin: send the local standard input to the process.
    :param use_terminal: the process runs on a terminal; connect it with the local one.
    :param detachable: Ctrl-] on a terminal ends the command and leaves the process running.
    """

    def __init__(
        self, api: Api, sandbox_id: str, message: Any, *, use_stdin: bool, use_terminal: bool, detachable: bool = False
    ) -> None:
        self._api = api
        self._sandbox_id = sandbox_id
        self._message = message
        self._use_stdin = use_stdin
        self._use_terminal = use_terminal
        self._detachable = detachable
        self._process_id = 0
        self._interrupted = False
        self._detached = False
        self._tasks = TaskSet()
        self._main: asyncio.Task[Any] | None = None
        self._out = stdio.Writer(sys.stdout.fileno())
        self._err = stdio.Writer(sys.stderr.fileno())

    async def run(self, call: Any, first: Any) -> int:
        """Send `first`, carry the streams to the process's end, and return its exit status (128 + N for signal N).

        :raises grpc.aio.AioRpcError: the call failed.
        :raises CliError: the call ended without an exit status.
        """
        self._main = asyncio.current_task()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        try:
            async with contextlib.AsyncExitStack() as stack:
                stack.push_async_callback(self._tasks.cancel)
                if self._use_terminal:
                    stack.enter_context(local_tty.raw_mode(self._resized, raw_stdin=self._use_stdin))
                await call.write(first)
                end = await self._receive(call)
        except asyncio.CancelledError:
            if self._detached:
                return 0
            if self._interrupted:
                return EXIT_INTERRUPTED
            raise
        finally:
            call.cancel()
            loop.remove_signal_handler(signal.SIGINT)
        return process_exit_status(end)

    async def _receive(self, call: Any) -> Exit:
        async for response in call:
            kind = response.WhichOneof("message")
            if output.json_enabled():
                await self._out.write(f"{json.dumps(output.to_json(response))}\n".encode())
            elif kind == "stdout":
                await self._out.write(response.stdout)
            elif kind == "stderr":
                await self._err.write(response.stderr)
            if kind == "process":
                self._started(call, response.process)
            elif kind == "exit":
                end: Exit = response.exit
                return end
        raise CliError("the daemon ended the call without an exit status", reason="NO_EXIT")

    def _started(self, call: Any, process: Any) -> None:
        self._process_id = process.process_id
        if self._use_terminal:
            self._resized()  # the size may have changed since the request, or be that of another client
        if self._use_stdin and not process.HasField("exit"):
            self._tasks.spawn(self._send_stdin(call))

    async def _send_stdin(self, call: Any) -> None:
        """Send standard input chunk by chunk; each write waits for the last one, so that a slow process slows us."""
        import grpc

        # `_receive` reports the error that ended the call.
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while data := await stdio.read(sys.stdin.fileno()):
                if self._detachable and self._use_terminal and _DETACH_KEY in data:
                    self._detach()
                    return
                await call.write(self._message(stdin=data))
            await call.write(self._message(stdin_eof=True))

    def _detach(self) -> None:
        self._detached = True
        assert self._main is not None
        self._main.cancel()

    def _interrupt(self) -> None:
        """Send the first Ctrl-C to the process; end the command on the second."""
        assert self._main is not None
        if self._interrupted or not self._process_id:
            self._interrupted = True
            self._main.cancel()
            return
        self._interrupted = True
        self._tasks.spawn(self._send_interrupt())

    # Signals and sizes are separate calls: on the stream they would queue behind input that the process does not read.

    async def _send_interrupt(self) -> None:
        import grpc

        from sandboxd.v1 import process_pb2

        with contextlib.suppress(grpc.RpcError):
            await self._api.processes.SendSignal(
                process_pb2.SendSignalRequest(sandbox_id=self._sandbox_id, process_id=self._process_id, signal="SIGINT")
            )

    def _resized(self) -> None:
        if self._process_id:
            self._tasks.spawn(self._send_size())

    async def _send_size(self) -> None:
        import grpc

        from sandboxd.v1 import process_pb2

        rows, cols = local_tty.size()
        size = process_pb2.Terminal(rows=rows, cols=cols)
        with contextlib.suppress(grpc.RpcError):
            await self._api.processes.ResizeTerminal(
                process_pb2.ResizeTerminalRequest(sandbox_id=self._sandbox_id, process_id=self._process_id, size=size)
            )
