"""One call to the guest, as the host sees it."""

from __future__ import annotations

import asyncio
from typing import Any

from agent.common.errors import GuestUnreachable
from agent.daemon.guestlink.guest_errors import from_guest
from agent.daemon.guestlink.protocol import LinkProtocol, set_callbacks
from guest import wire
from guest.wire import Frame, FrameReader, WireError
from guest.yamux import Stream

RECEIVE_WINDOW = 1 << 20
# Small enough that the frames of other streams get in between, large enough that a header costs nothing.
SEND_CHUNK_BYTES = 128 << 10
_BULK = frozenset({Frame.DATA, Frame.STDOUT, Frame.STDERR})
# Whoever is served a stream pays for each message: 0.5 ms of CPU time in the agent alone. So while much arrives, it is
# collected for a moment; what comes seldom or in small pieces is handed on at once.
_COLLECT_BYTES = 256 << 10
_COLLECT_S = 0.002
_MUCH_BYTES = 24 << 10


class CallStream:
    """The frames of one call. One task may receive and another send at the same time."""

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
        """Sends the request. :raises WireError: it is over the limit. :raises GuestUnreachable: the link is gone."""
        await self._send_whole(wire.pack_json(Frame.REQUEST, request))

    async def send(self, kind: Frame, data: bytes) -> None:
        """Sends bytes as frames of `kind`; waits while the guest does not read.

        :raises GuestUnreachable: the link is gone. Bytes for a call that has ended are dropped.
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
        """Sends a control message (EVENT)."""
        await self._send_whole(wire.pack_json(Frame.EVENT, value))

    async def send_eof(self) -> None:
        """Says that no more bytes will come."""
        await self._send_whole(wire.pack(Frame.EOF))

    async def _send_whole(self, data: bytes) -> None:
        """Sends a frame, in as many pieces as the guest's window asks for."""
        while data and (room := await self._room(1)):
            self._stream.send(data[:room])
            data = data[room:]

    async def _room(self, needed: int) -> int:
        """Returns how many bytes may be sent, at least `needed`; 0 if the guest has ended the call."""
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
        """Returns the next frame: (kind, bytes) for data, (EVENT | RESULT, dict), (EOF, b""); None after RESULT.

        Adjacent data frames of one kind are merged, up to `max_bytes`.

        :raises GuestUnreachable: the link is gone, or the guest broke the protocol.
        :raises AgentError: the guest answered with an error; see `from_guest`.
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
        self._stream.widen(RECEIVE_WINDOW)  # only now: a short call is spared the frame
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
                self._stream.reset()  # the answer ends the guest's side, too: nobody would read what it goes on to send
        if kind == Frame.ERROR:
            raise from_guest(value)
        return Frame(kind), value

    def end(self) -> None:
        """Abandons the call unless it has ended. Idempotent."""
        if not self._finished:
            self._finished = True
            self._stream.reset()
