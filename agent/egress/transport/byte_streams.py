"""Byte streams over sockets, plain and TLS, for code that reads and writes them from two tasks.

TLS is the ssl module on the socket itself: bytes go from the kernel to OpenSSL, past buffers of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Sequence

from agent.egress.transport.sockets import reset, wait_readable, wait_writable

READ_BYTES = 256 << 10
# One for all streams: it is filled and copied from without a pause in between.
_buffer = bytearray(READ_BYTES)
_view = memoryview(_buffer)
_HANDSHAKE_TIMEOUT_S = 15.0
# The other direction's turn in TLS (a key update while a buffer is full): rare, and its waiter is somebody else's.
_OTHER_TURN_S = 0.005


class Stream:
    """A connected, non-blocking socket. One task may read and one write at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    async def read(self) -> bytes:
        """Returns what has come, at most 256 KiB; b"" at the end. :raises OSError:"""
        while True:
            try:
                return self._take()
            except (BlockingIOError, ssl.SSLWantReadError):
                await wait_readable(self.sock)
            except ssl.SSLWantWriteError:
                await asyncio.sleep(_OTHER_TURN_S)

    def _take(self) -> bytes:
        count = self.sock.recv_into(_buffer)
        return bytes(_view[:count])

    async def write(self, data: bytes) -> None:
        """Sends all of it. :raises OSError:"""
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                await wait_writable(self.sock)
            except ssl.SSLWantReadError:
                await asyncio.sleep(_OTHER_TURN_S)

    async def send_eof(self) -> None:
        """Tells the other side that no more will come; reading goes on."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Closes in order: what was sent still arrives. Idempotent."""
        with contextlib.suppress(OSError, ValueError):
            self.sock.shutdown(socket.SHUT_WR)
        self.sock.close()

    def abort(self) -> None:
        """Closes by a reset. Idempotent."""
        reset(self.sock)


class TlsStream(Stream):
    """A stream in TLS."""

    sock: ssl.SSLSocket

    def _take(self) -> bytes:
        """Takes all records that are there: each call of the library's is for one, and what follows is for all."""
        count = self.sock.recv_into(_view)
        try:
            while count and count < READ_BYTES and (more := self.sock.recv_into(_view[count:])):
                count += more
        except ssl.SSLError:  # no more for now; if it is something worse, the next read says so
            pass
        return bytes(_view[:count])

    async def send_eof(self) -> None:
        """Sends close_notify; TLS 1.3 leaves the other direction open (RFC 8446, 6.1), the ssl module does not."""
        self._say_goodbye()
        await super().send_eof()

    def close(self) -> None:
        """Closes in order."""
        self._say_goodbye()
        super().close()

    def _say_goodbye(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.sock.unwrap()  # sends close_notify first; that it then wants the other side's is not waited for

    @property
    def protocol(self) -> str:
        """What both sides agreed to speak (RFC 7301); "" if nothing was said."""
        return self.sock.selected_alpn_protocol() or ""


async def handshake(
    sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, server_hostname: str | None = None
) -> TlsStream:
    """Returns the stream in TLS; takes the socket over. :raises OSError, TimeoutError: it is closed then."""
    wrapped = None
    try:
        wrapped = context.wrap_socket(
            sock, server_side=server_side, server_hostname=server_hostname, do_handshake_on_connect=False
        )
        async with asyncio.timeout(_HANDSHAKE_TIMEOUT_S):
            while True:
                try:
                    wrapped.do_handshake()
                    return TlsStream(wrapped)
                except ssl.SSLWantReadError:
                    await wait_readable(wrapped)
                except ssl.SSLWantWriteError:
                    await wait_writable(wrapped)
    except BaseException:
        (wrapped or sock).close()
        raise


async def relay(a: Stream, b: Stream, to_a: bytes = b"", to_b: bytes = b"") -> None:
    """Carries bytes both ways until both have ended, or one broke. :raises OSError:"""
    tasks = [asyncio.create_task(_pump(a, b, to_b)), asyncio.create_task(_pump(b, a, to_a))]
    await gather_or_cancel(tasks)


async def _pump(source: Stream, target: Stream, first: bytes) -> None:
    if first:
        await target.write(first)
    while data := await source.read():
        await target.write(data)
    await target.send_eof()


async def gather_or_cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Awaits tasks; when one fails, the others are cancelled. :raises: what the first that failed raised."""
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
