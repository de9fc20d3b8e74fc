"""asyncio protocol of a guest link: feeds received bytes to a yamux session, with flow control for sent ones."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from agent.common.errors import GuestUnreachable
from guest.yamux import Buffer, Stream, YamuxError, YamuxSession

_READ_BYTES = 256 << 10
_HIGH_WATER_BYTES = 512 << 10
# A guest that requests answers (pings, windows) without reading them would fill the host's memory.
_MAX_UNSENT_BYTES = 8 << 20

log = logging.getLogger(__name__)


class LinkProtocol(asyncio.BufferedProtocol):
    """Carries one yamux session; the future `lost` completes with the reason once the link is lost."""

    def __init__(self) -> None:
        self.session = YamuxSession(client=True, write=self._write, on_stream=None)
        self.lost: asyncio.Future[GuestUnreachable] = asyncio.get_running_loop().create_future()
        self.received_bytes = 0
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray(_READ_BYTES)
        self._view = memoryview(self._buffer)
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Called by asyncio; one buffer is enough, since payloads are copied to their streams at once."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Called by asyncio with the number of received bytes."""
        self.received_bytes += nbytes
        try:
            self.session.feed(self._view[:nbytes])
        except YamuxError as error:
            self.fail(f"the guest broke the protocol: {error}")

    def eof_received(self) -> bool:
        """Called by asyncio when the VMM closes the socket."""
        self.fail("the link was closed by the virtual machine")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self.fail(f"the link to the guest is gone: {exc or 'closed'}")

    def pause_writing(self) -> None:
        """Called by asyncio when too many bytes wait to be sent."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Called by asyncio."""
        self._writable.set()

    async def drained(self) -> None:
        """Wait until more may be sent."""
        while not self._writable.is_set():  # another waiter may have filled the buffer again
            await self._writable.wait()

    def fail(self, reason: str) -> None:
        """End the link and every stream on it. Idempotent."""
        if not self.lost.done():
            self.lost.set_result(GuestUnreachable(reason))
            self._writable.set()
            self.session.abandon()
            if self._transport is not None:
                self._transport.abort()

    def _write(self, data: Buffer) -> None:
        if self._transport is None or self.lost.done():
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            self.fail("the guest does not read its link")


def set_callbacks(stream: Stream, callback: Callable[[], None]) -> None:
    """Call `callback` on every change of the stream."""
    stream.on_readable = callback
    stream.on_writable = callback
