"""One call to the guest: its frames in both directions, and the errors that the guest reports."""

from __future__ import annotations

import asyncio
from typing import Any

from agent.common.errors import (
    AgentError,
    AlreadyExists,
    GuestError,
    GuestUnreachable,
    InvalidSpec,
    InvalidState,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from agent.daemon.guestlink.protocol import LinkProtocol, set_callbacks
from guest import wire
from guest.wire import Frame, FrameReader, WireError
from guest.yamux import Stream

RECEIVE_WINDOW = 1 << 20
# Small enough that the frames of other streams get in between, large enough that a header costs nothing.
SEND_CHUNK_BYTES = 128 << 10
_BULK = frozenset({Frame.DATA, Frame.STDOUT, Frame.STDERR})
# Each message to a client costs 0.5 ms of CPU time in the daemon. So bulk data is collected for a moment; small or rare
# pieces are passed on at once.
_COLLECT_BYTES = 256 << 10
_COLLECT_S = 0.002
_MUCH_BYTES = 24 << 10
_ERROR_TYPES: dict[str, type[AgentError]] = {  # by the code of an ERROR frame
    "NOT_FOUND": NotFound,
    "EXISTS": AlreadyExists,
    "DENIED": PermissionDenied,
    "INVALID": InvalidSpec,
    "STATE": InvalidState,
    "EXHAUSTED": ResourceExhausted,
}
_MAX_ERROR_CHARACTERS = 4096


class CallStream:
    """Frames of one call. One task may receive while another one sends."""

    def __init__(self, link: LinkProtocol, stream: Stream) -> None:
        self._link = link
        self._stream = stream
        self._frames = FrameReader(stream)
        self._changed: asyncio.Future[None] | None = None
        self._can_send: asyncio.Future[None] | None = None
        self._finished = False
        self._next: tuple[int, bytes] | None = None
        self._much_arrives = False
        set_callbacks(stream, self._wake)

    def _wake(self) -> None:
        for waiter in (self._changed, self._can_send):
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    async def start(self, request: dict[str, object]) -> None:
        """Send the request.

        :raises WireError: it is larger than the link allows.
        :raises GuestUnreachable: the link is lost.
        """
        await self._send_whole(wire.pack_json(Frame.REQUEST, request))

    async def send(self, kind: Frame, data: bytes) -> None:
        """Send bytes as frames of `kind`; wait while the guest does not read. Bytes for an ended call are dropped.

        :raises GuestUnreachable: the link is lost.
        """
        view = memoryview(data)
        while view:
            room = await self._room(wire.HEAD_BYTES + 1)
            if not room:
                return
            size = min(len(view), room - wire.HEAD_BYTES, SEND_CHUNK_BYTES)
            self._stream.send(wire.HEAD.pack(kind, size) + view[:size])
            view = view[size:]

    async def send_json(self, value: dict[str, object]) -> None:
        """Send a control message (EVENT).

        :raises GuestUnreachable: the link is lost.
        """
        await self._send_whole(wire.pack_json(Frame.EVENT, value))

    async def send_eof(self) -> None:
        """Send the end of the bytes (EOF).

        :raises GuestUnreachable: the link is lost.
        """
        await self._send_whole(wire.pack(Frame.EOF))

    async def _send_whole(self, data: bytes) -> None:
        """Send a frame, in as many pieces as the guest's window requires."""
        while data and (room := await self._room(1)):
            self._stream.send(data[:room])
            data = data[room:]

    async def _room(self, needed: int) -> int:
        """Wait until `needed` bytes may be sent; return how many may be, or 0 if the call has ended."""
        stream = self._stream
        while True:
            await self._link.drained()
            if self._link.lost.done():
                raise self._link.lost.result()
            if stream.was_reset or stream.remote_closed or stream.local_closed:
                return 0
            if stream.send_credit >= needed:
                return stream.send_credit
            self._can_send = asyncio.get_running_loop().create_future()
            try:
                await self._can_send
            finally:
                self._can_send = None

    async def recv(self, max_bytes: int = wire.MAX_DATA_BYTES) -> tuple[Frame, Any] | None:
        """Return the next frame: (kind, bytes) for data, (EVENT | RESULT, dict), (EOF, b""); None after RESULT.

        Adjacent data frames of one kind are merged, up to `max_bytes`.

        :raises GuestUnreachable: the link is lost, or the guest broke the protocol.
        :raises AgentError: the guest answered with an error; see `error_from_guest`.
        """
        if self._finished:
            return None
        if self._much_arrives and len(self._stream.inbox) < _COLLECT_BYTES and not self._stream.remote_closed:
            await asyncio.sleep(_COLLECT_S)
        while True:
            try:
                frame = self._take(max_bytes)
            except WireError as error:
                self._stream.reset()
                raise GuestUnreachable(f"the guest broke the protocol: {error}") from None
            if frame is not None:
                return self._deliver(*frame)
            if self._link.lost.done():
                raise self._link.lost.result()
            if self._stream.was_reset or self._stream.remote_closed:
                raise GuestUnreachable("the guest ended the call without an answer", reason="GUEST_CALL_ABORTED")
            self._changed = asyncio.get_running_loop().create_future()
            try:
                await self._changed
            finally:
                self._changed = None

    def _take(self, max_bytes: int) -> tuple[int, bytes] | None:
        frame, self._next = self._next or self._frames.next(max_bytes), None
        if frame is None or frame[0] not in _BULK:
            return frame
        self._stream.widen(RECEIVE_WINDOW)  # only for bulk data: a short call needs no window update
        kind, size = frame[0], len(frame[1])
        pieces = [frame[1]]
        while size < max_bytes:
            more = self._frames.next(max_bytes - size)
            if more is None:
                break
            if more[0] != kind:
                self._next = more
                break
            pieces.append(more[1])
            size += len(more[1])
        self._much_arrives = size >= _MUCH_BYTES
        return kind, b"".join(pieces) if len(pieces) > 1 else pieces[0]

    def _deliver(self, kind: int, payload: bytes) -> tuple[Frame, Any]:
        if kind in _BULK or kind == Frame.EOF:
            return Frame(kind), payload
        try:
            value = wire.parse_json(payload)
        except WireError as error:
            self._stream.reset()
            raise GuestUnreachable(f"the guest broke the protocol: {error}") from None
        if kind in (Frame.RESULT, Frame.ERROR):
            self._finished = True
            if self._stream.remote_closed:
                self._stream.close()
            else:
                self._stream.reset()  # the answer ends the call: nothing reads further bytes of it
        if kind == Frame.ERROR:
            raise error_from_guest(value)
        return Frame(kind), value

    def end(self) -> None:
        """Abort the call unless it has ended. Idempotent."""
        if not self._finished:
            self._finished = True
            self._stream.reset()


def error_from_guest(value: dict[str, Any]) -> AgentError:
    """Return the error for an ERROR frame, whose fields are untrusted: they may be missing or of any type.

    The reason is the errno's name, or the guest's own (EXEC_NOT_FOUND), if it is well-formed.
    """
    kind = _ERROR_TYPES.get(str(value.get("code")), GuestError)
    message = str(value.get("message") or "the guest gave no reason")[:_MAX_ERROR_CHARACTERS]
    reason = str(value.get("errno") or "")
    valid = 0 < len(reason) <= 63 and reason.isascii() and reason.replace("_", "").isalnum() and reason.isupper()
    return kind(message, reason=reason if valid else None)
