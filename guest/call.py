"""The guest's end of one call from the host: receive frames, send frames, answer."""

from __future__ import annotations

import errno
import json

from guest import wire
from guest.reactor import Cancelled, Waiters
from guest.wire import CallError, Frame, FrameReader
from guest.yamux import HEADER_BYTES, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Protocol

    Handler = Callable[["Call"], Awaitable[dict[str, object]]]

    class SendQueue(Protocol):
        """The part of `guest.link.Link` that a call uses; a type of its own, since `link` imports this module."""

        unblocked: Waiters

        @property
        def blocked(self) -> bool:
            """True while data frames must wait for `unblocked`."""


HEADROOM = HEADER_BYTES + wire.HEAD_BYTES
# Half of yamux's initial window: the receiver grants credit after half of a window, so that a sender always gets room
# for a whole chunk. Large, because the Python code per chunk costs as much as copying tens of KiB in an emulated guest.
CHUNK_BYTES = (128 << 10) - HEADROOM
CallAbandoned = Cancelled  # raised at an await of a handler when the host abandons the call

_CODES = {
    "NOT_FOUND": (errno.ENOENT, errno.ESRCH, errno.ENXIO),
    "EXISTS": (errno.EEXIST,),
    "DENIED": (errno.EACCES, errno.EPERM, errno.EROFS),
    "INVALID": (errno.EINVAL, errno.ENAMETOOLONG),
    "EXHAUSTED": (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EFBIG),
}
_CODE_BY_ERRNO = {number: code for code, numbers in _CODES.items() for number in numbers}


def os_error(error: OSError, subject: str = "") -> CallError:
    """Return the CallError for an OSError; its code is STATE if the errno(3) is not in the table."""
    number = error.errno or 0
    subject = subject or str(error.filename or "")
    text = error.strerror or str(error)
    return CallError(
        _CODE_BY_ERRNO.get(number, "STATE"),
        f"{subject}: {text}" if subject else text,
        errno.errorcode.get(number, ""),
    )


class Call:
    """A request of the host, and the frames that follow in both directions."""

    __slots__ = ("_frames", "_link", "_readers", "_stream", "_writers", "req")

    def __init__(self, stream: Stream, link: SendQueue) -> None:
        self.req: dict[str, object] = {}
        self._stream = stream
        self._link = link
        self._frames = FrameReader(stream)
        self._readers = Waiters()
        self._writers = Waiters()
        stream.on_readable = self._readers.wake
        stream.on_writable = self._writers.wake

    @property
    def link_lost(self) -> bool:
        """True if the call ended because the link was lost, not because the host abandoned the call."""
        return self._stream.session.abandoned

    @property
    def host_done(self) -> bool:
        """True if the host has closed its side of the stream and all its frames were received."""
        return (self._stream.remote_closed or self._stream.was_reset) and not self._stream.inbox

    async def recv(self, max_bytes: int = 64 << 10) -> tuple[int, bytes]:
        """Return the next frame as (type, payload); (Frame.EOF, b"") once the host sends no more.

        :param max_bytes: longer data frames are returned in pieces of this size.

        :raises WireError: the host broke the frame format.
        """
        while True:
            frame = self._frames.next(max_bytes)
            if frame is not None:
                return frame
            if self._stream.remote_closed or self._stream.was_reset:
                return Frame.EOF, b""
            await self._readers.wait()

    async def send(self, kind: int, data: bytes) -> None:
        """Send bytes as one or more frames, waiting for flow control."""
        for start in range(0, len(data), CHUNK_BYTES):
            piece = data[start : start + CHUNK_BYTES]
            await self._ready_to_send(wire.HEAD_BYTES + len(piece))
            self._stream.send(wire.pack(kind, piece))

    async def send_buffer(self, kind: int, buffer: bytearray, size: int) -> None:
        """Send `buffer[HEADROOM:HEADROOM + size]` as one frame without copying it; `size` is at most CHUNK_BYTES."""
        await self._ready_to_send(wire.HEAD_BYTES + size)
        wire.HEAD.pack_into(buffer, HEADER_BYTES, kind, size)
        self._stream.send_in_place(buffer, wire.HEAD_BYTES + size)

    async def send_eof(self) -> None:
        """Tell the host that no more data frames follow."""
        await self._ready_to_send(wire.HEAD_BYTES)
        self._stream.send(wire.pack(Frame.EOF))

    async def send_json(self, kind: int, value: dict[str, object], *, last: bool = False) -> None:
        """Send one JSON frame, which may be larger than the window; `last` closes this side of the stream after it."""
        data = wire.pack_json(kind, value)
        for start in range(0, len(data), CHUNK_BYTES):
            piece = data[start : start + CHUNK_BYTES]
            await self._ready_to_send(len(piece))
            self._stream.send(piece, last=last and start + CHUNK_BYTES >= len(data))

    async def _ready_to_send(self, size: int) -> None:
        while True:
            if self._stream.was_reset:
                raise CallAbandoned
            if self._link.blocked:
                await self._link.unblocked.wait()
            elif self._stream.send_credit < size:
                await self._writers.wait()
            else:
                return

    async def answer(self, handlers: dict[str, Handler]) -> None:
        """Read the request, run its handler, and send the result or the error as the last frame."""
        kind, value = Frame.ERROR, {}
        try:
            value = await self._handle(handlers)
            kind = Frame.RESULT
        except CallError as error:
            value = {"code": error.code, "message": error.message, "errno": error.errno}
        except OSError as error:
            value = vars(os_error(error))
        except (ValueError, TypeError, KeyError, wire.WireError) as error:
            value = {"code": "INVALID", "message": f"bad request: {error!r}", "errno": ""}
        await self.send_json(kind, value, last=True)

    async def _handle(self, handlers: dict[str, Handler]) -> dict[str, object]:
        kind, payload = await self.recv()
        if kind != Frame.REQUEST:
            raise CallError("INVALID", "the first frame of a call must be a request")
        self.req = wire.parse_json(payload)
        operation = self.req.get("op")
        handler = handlers.get(operation) if isinstance(operation, str) else None
        if handler is None:
            raise CallError(
                "UNSUPPORTED",
                f"unknown operation {json.dumps(operation)[:100]}; the guest's code is older than the agent",
            )
        return await handler(self)
