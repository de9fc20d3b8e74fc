"""One attached process: its bytes to and from the standard streams, its signals and sizes, its exit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from agent.cli import output
from agent.cli.errors import INTERRUPTED, CliError, exit_status
from agent.cli.terminal import stdio, terminal
from agent.common.api_client import Api

if TYPE_CHECKING:
    from sandboxd.v1.process_pb2 import Exit

_LEAVE = 0x1D  # Ctrl-], as telnet(1) has it


class Session:
    """Carries one Exec or Attach call.

    :param message: ExecRequest or AttachRequest.
    :param use_stdin: pass our standard input on.
    :param use_terminal: the process has a terminal, which is shown on ours.
    :param can_leave: Ctrl-] on a terminal leaves the process running.
    """

    def __init__(
        self, api: Api, sandbox_id: str, message: Any, *, use_stdin: bool, use_terminal: bool, can_leave: bool = False
    ) -> None:
        self._api = api
        self._sandbox_id = sandbox_id
        self._message = message
        self._use_stdin = use_stdin
        self._use_terminal = use_terminal
        self._can_leave = can_leave
        self._process_id = 0
        self._interrupted = False
        self._left = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._main: asyncio.Task[Any] | None = None
        self._out = stdio.Output(sys.stdout.fileno())
        self._err = stdio.Output(sys.stderr.fileno())

    async def run(self, call: Any, first: Any) -> int:
        """Returns the exit status: the process's own, 128 + n for signal n. :raises grpc.aio.AioRpcError:"""
        self._main = asyncio.current_task()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        try:
            async with contextlib.AsyncExitStack() as stack:
                stack.push_async_callback(self._end_tasks)
                if self._use_terminal:
                    stack.enter_context(terminal.raw(self._resized, keys=self._use_stdin))
                await call.write(first)
                ended = await self._follow(call)
        except asyncio.CancelledError:
            if self._left:
                return 0
            if self._interrupted:
                return INTERRUPTED
            raise
        finally:
            call.cancel()
            loop.remove_signal_handler(signal.SIGINT)
        return exit_status(ended)

    async def _follow(self, call: Any) -> Exit:
        async for response in call:
            kind = response.WhichOneof("message")
            if output.json_wanted():
                await self._out.write(f"{json.dumps(output.to_json(response))}\n".encode())
            elif kind == "stdout":
                await self._out.write(response.stdout)
            elif kind == "stderr":
                await self._err.write(response.stderr)
            if kind == "process":
                self._started(call, response.process)
            elif kind == "exit":
                ended: Exit = response.exit
                return ended
        raise CliError("the daemon ended the call without the process's exit", reason="NO_EXIT")

    def _started(self, call: Any, process: Any) -> None:
        self._process_id = process.process_id
        if self._use_terminal:
            self._resized()  # it may have another size by now, or had another client
        if self._use_stdin and not process.HasField("exit"):
            self._spawn(self._feed(call))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end_tasks(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _feed(self, call: Any) -> None:
        """Passes standard input on; one piece is under way at a time, so a slow reader slows the writer."""
        import grpc

        # Whatever ends the call is reported by the side that reads it.
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while data := await stdio.read(sys.stdin.fileno()):
                if self._can_leave and self._use_terminal and _LEAVE in data:
                    self._leave()
                    return
                await call.write(self._message(stdin=data))
            await call.write(self._message(stdin_eof=True))

    def _leave(self) -> None:
        self._left = True
        assert self._main is not None
        self._main.cancel()

    def _interrupt(self) -> None:
        """The first Ctrl-C is the process's, the next one ours."""
        assert self._main is not None
        if self._interrupted or not self._process_id:
            self._interrupted = True
            self._main.cancel()
            return
        self._interrupted = True
        self._spawn(self._send_interrupt())

    # Signals and sizes are calls of their own: on the stream they would wait behind input that nobody reads.

    async def _send_interrupt(self) -> None:
        import grpc

        from sandboxd.v1 import process_pb2

        with contextlib.suppress(grpc.RpcError):
            await self._api.processes.SendSignal(
                process_pb2.SendSignalRequest(sandbox_id=self._sandbox_id, process_id=self._process_id, signal="SIGINT")
            )

    def _resized(self) -> None:
        if self._process_id:
            self._spawn(self._send_size())

    async def _send_size(self) -> None:
        import grpc

        from sandboxd.v1 import process_pb2

        rows, cols = terminal.size()
        size = process_pb2.Terminal(rows=rows, cols=cols)
        with contextlib.suppress(grpc.RpcError):
            await self._api.processes.ResizeTerminal(
                process_pb2.ResizeTerminalRequest(sandbox_id=self._sandbox_id, process_id=self._process_id, size=size)
            )
