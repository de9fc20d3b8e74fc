"""One client's connection to one sandbox, as the method handlers see it: session, streams, open files, processes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from aiohttp import WSMsgType, web

from agent.common.aio import TaskSet
from agent.gateway.errors import CallError, aborted
from agent.gateway.jsonrpc.child_process import ChildProcess
from agent.gateway.jsonrpc.messages import encode, error_message, result_message
from agent.gateway.jsonrpc.stream_table import StreamTable
from agent.gateway.metrics import BYTES
from agent.gateway.nodes.guest_file import GuestFile
from agent.gateway.sandboxes.session import Session

# The sockets of the SDKs close at larger messages: the default of websockets for Python, of ws for JavaScript.
_PYTHON_MAX_BYTES, _JAVASCRIPT_MAX_BYTES = 1 << 20, 100 << 20
_CLOSE_GOING_AWAY = 1001
_MAX_REASON_BYTES = 120  # of a close frame, RFC 6455, 5.5


class RpcConnection:
    """One client's socket to one sandbox. Resources and tasks of its calls end with it.

    :param is_python: the client is the Python SDK, whose protocol differs in places.
    """

    def __init__(self, ws: web.WebSocketResponse, session: Session, *, is_python: bool) -> None:
        self.session = session
        self.is_python = is_python
        self.room = asyncio.Event()  # set when a call ends or spooled bytes change
        self.tasks = TaskSet()
        self.streams = StreamTable(self.send, self.tasks, ends_after_error=is_python, on_spool_change=self.room.set)
        self.open_files: dict[int, GuestFile] = {}  # by file handle id
        self.children: dict[int, ChildProcess] = {}  # started on this connection and running, by PID
        self._ws = ws
        self._abortable: dict[int, asyncio.Task[Any]] = {}
        self._aborted: set[int] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine in a task that ends with the connection at the latest."""
        return self.tasks.spawn(work)

    # -- sending -------------------------------------------------------------------------------------------------------

    async def send(self, message: object) -> None:
        """Send a message; wait while the client does not read. Messages to a closed socket are dropped."""
        if not self.session.ending:
            await self.send_encoded(encode(message))

    async def send_encoded(self, data: bytes) -> None:
        """Send an encoded message, even while the sandbox is being deleted."""
        BYTES.labels("to_client").inc(len(data))
        with contextlib.suppress(ConnectionError):
            await self._ws.send_frame(data, WSMsgType.TEXT)

    async def send_result(self, request_id: int, result: dict[str, object]) -> None:
        """Answer a call. A result that the SDK's socket would not accept is replaced by an error.

        :param result: {"ok": value} or {"error": error object}.
        """
        if self.session.ending:
            return
        data = result_message(request_id, result)
        max_bytes = _PYTHON_MAX_BYTES if self.is_python else _JAVASCRIPT_MAX_BYTES
        if len(data) >= max_bytes:
            error = CallError(
                "RangeError",
                f"the answer has {len(data)} bytes, and this SDK accepts less than {max_bytes} at once; "
                "read large files in pieces: open the file and read from it",
                code="EFBIG",
            )
            data = result_message(request_id, {"error": error.to_json()})
        await self.send_encoded(data)

    async def send_error(self, request_id: int | None, code: int, message: str, data: object = None) -> None:
        """Send a JSON-RPC error response. :param code: see `agent.gateway.jsonrpc.messages`."""
        await self.send(error_message(request_id, code, message, data))

    # -- aborts --------------------------------------------------------------------------------------------------------

    async def run_abortable(self, abort_id: int, work: Coroutine[Any, Any, object]) -> object:
        """Run a call so that `abort` can end it.

        :raises CallError: the call was aborted, or failed.
        """
        task = asyncio.ensure_future(work)
        self._abortable[abort_id] = task
        try:
            return await task
        except asyncio.CancelledError:
            if abort_id in self._aborted:
                raise aborted() from None
            raise
        finally:
            task.cancel()
            self._aborted.discard(abort_id)
            if self._abortable.get(abort_id) is task:
                del self._abortable[abort_id]

    def abort(self, abort_id: int) -> None:
        """End the call with this abort id, if it is running."""
        task = self._abortable.get(abort_id)
        if task is not None:
            self._aborted.add(abort_id)
            task.cancel()

    # -- the end -------------------------------------------------------------------------------------------------------

    async def close(self, reason: str) -> None:
        """Close the socket with status 1001 and a reason, which the SDKs report as the end of the sandbox."""
        await self._ws.close(code=_CLOSE_GOING_AWAY, message=reason.encode()[:_MAX_REASON_BYTES])

    async def release(self) -> None:
        """End streams and tasks and close the open files, after the socket has closed."""
        self.streams.end_all()
        await self.tasks.cancel()
        self.streams.discard_all()
        for file in self.open_files.values():
            file.close()
