"""All streams of one connection by id, and the client's events on them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar

from agent.common.aio import TaskSet
from agent.gateway.errors import CallError
from agent.gateway.jsonrpc.messages import Send, StreamEvent, stream_error, stream_notification
from agent.gateway.jsonrpc.streams import InboundStream, OutboundStream

_MAX_INBOUND = 4096

# Of the running call: set once its response, which names the streams of the call, has been sent.
call_answered: ContextVar[asyncio.Event] = ContextVar("call_answered")


class StreamTable:
    """Streams of one connection.

    :param send: sends a message to the client.
    :param tasks: tasks that end with the connection at the latest.
    :param ends_after_error: see `OutboundStream`.
    :param on_spool_change: called when `spooled_bytes` changes.
    """

    def __init__(
        self, send: Send, tasks: TaskSet, *, ends_after_error: bool, on_spool_change: Callable[[], None]
    ) -> None:
        self.spooled_bytes = 0  # of all inbound streams, on disk
        self._send = send
        self._tasks = tasks
        self._ends_after_error = ends_after_error
        self._on_spool_change = on_spool_change
        self._inbound: dict[int, InboundStream] = {}
        self._outbound: dict[int, OutboundStream] = {}

    def handle_event(self, event: str, params: StreamEvent) -> None:
        """Apply a client's notification. :param event: "start", "enqueue", "end", "error" or "cancel"."""
        stream_id = params.stream_id
        if event == "start" and stream_id not in self._inbound:
            self._drop_oldest_if_full()
            self._inbound[stream_id] = InboundStream(self._on_buffered)
        elif event == "cancel":
            outbound = self._outbound.pop(stream_id, None)
            if outbound is not None:
                outbound.cancel()
        stream = self._inbound.get(stream_id)
        if stream is None:
            return
        if event == "enqueue":
            try:
                stream.feed(params.data)
            except OSError as error:
                text = f"the gateway has no room for the stream: {error.strerror}"
                stream.end(CallError("Error", text, code="ENOSPC"))
        elif event == "end":
            stream.end()
        elif event == "error":
            stream.end(stream_error(params.error))

    def _drop_oldest_if_full(self) -> None:
        # A stream that no call has claimed stays here when its call was rejected.
        if len(self._inbound) >= _MAX_INBOUND:
            oldest = next(iter(self._inbound))
            self._inbound.pop(oldest).discard()

    def _on_buffered(self, change: int) -> None:
        self.spooled_bytes += change
        self._on_spool_change()

    @contextlib.asynccontextmanager
    async def inbound(self, stream_id: int) -> AsyncIterator[InboundStream]:
        """Claim a stream that the client writes, which may have started already.

        On exit the stream is discarded, and the client is told to cancel it unless the client has ended it.
        """
        stream = self._inbound.get(stream_id)
        if stream is None:
            stream = self._inbound[stream_id] = InboundStream(self._on_buffered)
        try:
            yield stream
        finally:
            if not stream.ended:
                self._tasks.spawn(self._cancel_inbound(stream_id))
            stream.discard()
            self._inbound.pop(stream_id, None)

    async def _cancel_inbound(self, stream_id: int) -> None:
        await self._send(stream_notification("cancel", stream_id, reason=None))

    def outbound(self) -> OutboundStream:
        """Return a new stream to the client, which starts once the running call has been answered.

        The caller must `remove` it after its end.
        """
        stream = OutboundStream(self._send, call_answered.get(), ends_after_error=self._ends_after_error)
        self._outbound[stream.id] = stream
        return stream

    def remove(self, stream: OutboundStream) -> None:
        """Remove an outbound stream that has ended. Idempotent."""
        self._outbound.pop(stream.id, None)

    def end_all(self) -> None:
        """Cancel outbound streams and fail inbound ones: the client disconnected."""
        for outbound in self._outbound.values():
            outbound.cancel()
        for inbound in self._inbound.values():
            inbound.end(CallError("ConnectionAborted", "the client closed its connection"))

    def discard_all(self) -> None:
        """Free the buffers of all inbound streams."""
        for inbound in self._inbound.values():
            inbound.discard()
