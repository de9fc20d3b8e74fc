"""One WebSocket of an SDK: JSON-RPC 2.0 requests in any number at once, and byte streams both ways.

What a client started on it (open files, streams, calls) ends with it. Every byte of a client is checked: a request that
is malformed gets an error, never an exception here.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import msgspec
from aiohttp import WSMsgType, web

from agent.common.telemetry import log, tracer
from agent.gateway.errors import Failure, aborted, from_rpc
from agent.gateway.jsonrpc.schema import Params
from agent.gateway.jsonrpc.streams import Inbound, Outbound, notification
from agent.gateway.metrics import BYTES, CALL_SECONDS, CALLS_OPEN

if TYPE_CHECKING:
    from agent.gateway.jsonrpc.session import Attachment
    from agent.gateway.methods.open_files import OpenFile
    from agent.gateway.methods.processes import Child

_MAX_CALLS = 4096
_MAX_STREAMS = 4096
# Larger messages end the SDKs' sockets: websockets' default for Python, that of ws for JavaScript.
_PYTHON_LIMIT, _JAVASCRIPT_LIMIT = 1 << 20, 100 << 20
_PARSE_ERROR, _INVALID_REQUEST, _NO_METHOD, _INVALID_PARAMS, _INTERNAL = -32700, -32600, -32601, -32602, -32603

Handler = Callable[["Connection", Any], Awaitable[object]]
METHODS: dict[str, tuple[type[Params], Handler]] = {}


def method(name: str, params: type[Params]) -> Callable[[Handler], Handler]:
    """Enters a function as the handler of a method; it returns the value of "ok"."""

    def enter(handler: Handler) -> Handler:
        METHODS[name] = (params, handler)
        return handler

    return enter


class _Message(msgspec.Struct):
    method: str
    id: int | None = None
    params: msgspec.Raw = msgspec.Raw(b"{}")


class _StreamParams(msgspec.Struct, rename="camel"):
    stream_id: int
    data: bytes = b""
    error: Any = None


_decode = msgspec.json.Decoder(_Message).decode
_decode_stream = msgspec.json.Decoder(_StreamParams).decode
_encode = msgspec.json.Encoder().encode
# Of the call that runs: set when its answer, which names its streams, has been sent.
_answered: ContextVar[asyncio.Event] = ContextVar("answered")


@dataclass(frozen=True)
class Limits:
    """What one connection may hold: bytes of requests in memory, bytes of streams on the disk."""

    message_bytes: int
    spool_bytes: int


class Connection:
    """One client's socket to one sandbox.

    :param is_python: the client is the Python SDK, which differs where its own habits ask for it.
    """

    def __init__(self, ws: web.WebSocketResponse, attachment: Attachment, limits: Limits, *, is_python: bool) -> None:
        self.attachment = attachment
        self.is_python = is_python
        self.handles: dict[int, OpenFile] = {}  # by id
        self.children: dict[int, Child] = {}  # processes that were started here and run, by PID
        self._ws = ws
        self._limits = limits
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls = 0
        self._held_bytes = self._spooled_bytes = 0
        self._room = asyncio.Event()
        self._inbound: dict[int, Inbound] = {}
        self._outbound: dict[int, Outbound] = {}
        self._abortable: dict[int, asyncio.Task[Any]] = {}
        self._aborted: set[int] = set()
        self._ponging = False

    # -- sending -------------------------------------------------------------------------------------------------------

    async def send(self, message: object) -> None:
        """Sends one message; waits while the client does not read. What a closed socket cannot carry is dropped."""
        if not self.attachment.ending:
            await self._send_encoded(_encode(message))

    async def _send_encoded(self, data: bytes) -> None:
        BYTES.labels("to_client").inc(len(data))
        with contextlib.suppress(ConnectionError):
            await self._ws.send_frame(data, WSMsgType.TEXT)

    async def _answer(self, request_id: int, result: dict[str, object]) -> None:
        if self.attachment.ending:
            return
        data = _encode({"jsonrpc": "2.0", "id": request_id, "result": result})
        limit = _PYTHON_LIMIT if self.is_python else _JAVASCRIPT_LIMIT
        if len(data) >= limit:
            failure = Failure(
                "RangeError",
                f"the answer has {len(data)} bytes, and this SDK takes less than {limit} at once; "
                "read large files in pieces: open the file and read from it",
                code="EFBIG",
            )
            data = _encode({"jsonrpc": "2.0", "id": request_id, "result": {"error": failure.to_json()}})
        await self._send_encoded(data)

    async def _refuse(self, request_id: int | None, code: int, message: str, data: object = None) -> None:
        error: dict[str, object] = {"code": code, "message": message}
        if data is not None:
            error["data"] = data
        await self.send({"jsonrpc": "2.0", "id": request_id, "error": error})

    # -- receiving -----------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Serves the socket until it is closed, by either side; then ends everything that was begun on it.

        A client that says nothing for long is gone: both SDKs send something every 20 s at least.
        """
        try:
            async for message in self._ws:
                if message.type is WSMsgType.TEXT or message.type is WSMsgType.BINARY:
                    BYTES.labels("from_client").inc(len(message.data))
                    if message.data in ("ping", b"ping"):
                        self._pong()
                    else:
                        self._take(message.data)
                    del message  # a large one is not kept while we wait for the next
                    await self._until_room()
        except TimeoutError:
            log.info("client is silent", sandbox_id=self.attachment.id)
        finally:
            await self._end()

    async def _until_room(self) -> None:
        while (
            self._calls >= _MAX_CALLS
            or self._held_bytes > self._limits.message_bytes
            or self._spooled_bytes > self._limits.spool_bytes
        ) and not self._ws.closed:
            self._room.clear()
            await self._room.wait()

    async def _end(self) -> None:
        for stream in self._outbound.values():
            stream.cancel()
        for source in self._inbound.values():
            source.end(Failure("ConnectionAborted", "the client closed its connection"))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for source in self._inbound.values():
            source.discard()
        for handle in self.handles.values():
            handle.close()

    async def close(self, reason: str) -> None:
        """Closes the socket as the SDKs expect it when a sandbox is over: 1001 and a reason."""
        await self._ws.close(code=1001, message=reason.encode()[:120])

    def _pong(self) -> None:
        # At most one is under way: a client that does not read must not pile them up.
        if not self._ponging:
            self._ponging = True

            async def pong() -> None:
                try:
                    await self._send_encoded(b"pong")
                finally:
                    self._ponging = False

            self.spawn(pong())

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts work that ends with the connection at the latest."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _take(self, data: str | bytes) -> None:
        try:
            message = _decode(data)
        except msgspec.ValidationError as error:
            self.spawn(self._refuse(None, _INVALID_REQUEST, f"not a JSON-RPC 2.0 request: {error}"))
            return
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self.spawn(self._refuse(None, _PARSE_ERROR, f"not JSON: {error}"))
            return
        if message.id is not None:
            self._calls += 1
            self._held_bytes += len(data)
            self.spawn(self._call(message, len(data)))
        elif message.method.startswith("$sandbox.stream."):
            with contextlib.suppress(msgspec.DecodeError):  # nobody waits for an answer
                self._take_stream(message.method.removeprefix("$sandbox.stream."), _decode_stream(message.params))

    async def _call(self, message: _Message, size: int) -> None:
        name, start = message.method, time.perf_counter()
        assert message.id is not None
        label, outcome = name if name in METHODS else "unknown", "ok"
        answered = asyncio.Event()
        _answered.set(answered)
        CALLS_OPEN.inc()
        try:
            with tracer.start_as_current_span(f"gateway.{label}"):
                outcome = await self._run(message.id, message)
        finally:
            answered.set()
            CALLS_OPEN.dec()
            CALL_SECONDS.labels(label, outcome).observe(time.perf_counter() - start)
            self._calls -= 1
            self._held_bytes -= size
            self._room.set()

    async def _run(self, request_id: int, message: _Message) -> str:
        """Carries out a request and answers it; returns the outcome for the metrics."""
        entry = METHODS.get(message.method)
        if entry is None:
            await self._refuse(request_id, _NO_METHOD, "Method not found")
            return "no_method"
        kind, handler = entry
        try:
            params = msgspec.json.decode(message.params, type=kind)
            message.params = msgspec.Raw(b"")
            result: dict[str, object] = {"ok": await self._abortable_call(handler, params)}
        except msgspec.DecodeError as error:
            await self._refuse(request_id, _INVALID_PARAMS, f"invalid parameters: {error}", _zod_like(str(error)))
            return "invalid"
        except Failure as failure:
            result = {"error": failure.to_json()}
        except grpc.aio.AioRpcError as error:
            result = {"error": from_rpc(error).to_json()}
        except Exception as error:  # noqa: BLE001  a defect of ours must not end the connection
            incident = secrets.token_hex(4)
            log.error("internal error", incident=incident, method=message.method, exc_info=error)
            await self._refuse(request_id, _INTERNAL, f"internal error, incident {incident}: see the gateway's log")
            return "internal"
        await self._answer(request_id, result)
        return "error" if "error" in result else "ok"

    # -- aborts --------------------------------------------------------------------------------------------------------

    async def _abortable_call(self, handler: Handler, params: Any) -> object:
        abort_id = getattr(params, "abort_id", None)
        if abort_id is None:
            return await handler(self, params)
        task = asyncio.ensure_future(handler(self, params))
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
        """Ends the call that was made with this id, if there is one."""
        task = self._abortable.get(abort_id)
        if task is not None:
            self._aborted.add(abort_id)
            task.cancel()

    # -- streams -------------------------------------------------------------------------------------------------------

    def _take_stream(self, event: str, params: _StreamParams) -> None:
        stream_id = params.stream_id
        if event == "start" and stream_id not in self._inbound:
            self._make_room_for_stream()
            self._inbound[stream_id] = Inbound(self._on_spooled)
        elif event == "cancel":
            outbound = self._outbound.pop(stream_id, None)
            if outbound is not None:
                outbound.cancel()
        source = self._inbound.get(stream_id)
        if source is None:
            return
        if event == "enqueue":
            try:
                source.feed(params.data)
            except OSError as error:
                source.end(Failure("Error", f"the gateway has no room for the stream: {error.strerror}", code="ENOSPC"))
        elif event == "end":
            source.end()
        elif event == "error":
            source.end(_stream_failure(params.error))

    def _make_room_for_stream(self) -> None:
        """Drops the oldest stream that nobody claimed: its call was refused."""
        if len(self._inbound) >= _MAX_STREAMS:
            oldest = next(iter(self._inbound))
            self._inbound.pop(oldest).discard()

    def _on_spooled(self, change: int) -> None:
        self._spooled_bytes += change
        self._room.set()

    @contextlib.asynccontextmanager
    async def inbound(self, stream_id: int) -> Any:
        """Yields a stream that the client writes, which may have begun already. In the end it is told to stop."""
        source = self._inbound.get(stream_id)
        if source is None:
            source = self._inbound[stream_id] = Inbound(self._on_spooled)
        try:
            yield source
        finally:
            if not source.over:
                self.spawn(self.send(notification("$sandbox.stream.cancel", streamId=stream_id, reason=None)))
            source.discard()
            self._inbound.pop(stream_id, None)

    def outbound(self) -> Outbound:
        """Returns a stream that the client reads; `forget` it once it has ended.

        It begins once the call in which it is made has been answered.
        """
        stream = Outbound(self.send, _answered.get(), ends_after_error=self.is_python)
        self._outbound[stream.id] = stream
        return stream

    def forget(self, stream: Outbound) -> None:
        """Drops an outbound stream that has ended. Idempotent."""
        self._outbound.pop(stream.id, None)


def _stream_failure(error: Any) -> Failure:
    """Returns what a client says of its own stream: an error object, or a bare text from Python."""
    if isinstance(error, dict):
        return Failure(str(error.get("constructorName") or "Error")[:64], str(error.get("message") or "stream error"))
    return Failure("Error", str(error or "the stream failed"))


def _zod_like(text: str) -> dict[str, object]:
    """Returns what the Python SDK reads of invalid parameters: a list of {expected, code, path, message} as JSON."""
    message, _, where = text.partition(" - at `$")
    expected = message.partition("`")[2].partition("`")[0]
    path = [part for part in where.rstrip("`").replace("[", ".").replace("]", "").split(".") if part]
    if "missing required field" in message:
        path, expected = [*path, expected], "value"
    items = [{"expected": expected or "value", "code": "invalid_type", "path": path, "message": message}]
    return {"constructorName": "ZodError", "message": _encode(items).decode()}
