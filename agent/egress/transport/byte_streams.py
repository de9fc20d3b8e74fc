"""Byte streams over plain and TLS sockets, for code with one reading and one writing task.

TLS wraps the socket itself by the ssl module: bytes go from the kernel to OpenSSL without a buffer in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Sequence

from agent.common.aio import cancel_and_wait
from agent.egress.transport.sockets import reset, wait_readable, wait_writable

READ_BYTES = 256 << 10
# Shared by all streams: there is no await between filling it and copying from it.
_buffer = bytearray(READ_BYTES)
_view = memoryview(_buffer)
_HANDSHAKE_TIMEOUT_S = 15.0
# TLS needs the other direction first (a key update while a buffer is full). Rare, so it is polled: the other task
# registers for that event, and a socket can be registered only once.
_OTHER_TURN_S = 0.005


class Stream:
    """Connected, non-blocking socket. At a time, one task may read and one may write."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    async def read(self) -> bytes:
        """Wait for data and return it, at most 256 KiB; b"" at the end of the stream.

        :raises OSError: the connection broke.
        """
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
        """Send all of `data`.

        :raises OSError: the connection broke.
        """
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                await wait_writable(self.sock)
            except ssl.SSLWantReadError:
                await asyncio.sleep(_OTHER_TURN_S)

    async def send_eof(self) -> None:
        """Signal the end of this direction to the other side; reading remains possible."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close in order: data that was sent still arrives. Idempotent."""
        with contextlib.suppress(OSError, ValueError):
            self.sock.shutdown(socket.SHUT_WR)
        self.sock.close()

    def abort(self) -> None:
        """Close by a reset. Idempotent."""
        reset(self.sock)


class TlsStream(Stream):
    """TLS over a stream."""

    sock: ssl.SSLSocket

    def _take(self) -> bytes:
        """Read all TLS records that have arrived: OpenSSL returns one per call, but the reader has costs per batch."""
        count = self.sock.recv_into(_view)
        try:
            while count and count < READ_BYTES and (more := self.sock.recv_into(_view[count:])):
                count += more
        except ssl.SSLError:  # no more records for now; any other error recurs at the next read
            pass
        return bytes(_view[:count])

    async def send_eof(self) -> None:
        """Send close_notify. TLS 1.3 leaves the other direction open (RFC 8446, 6.1), but the ssl module does not."""
        self._say_goodbye()
        await super().send_eof()

    def close(self) -> None:
        """Send close_notify and close in order. Idempotent."""
        self._say_goodbye()
        super().close()

    def _say_goodbye(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.sock.unwrap()  # sends close_notify, and raises instead of waiting for the peer's

    @property
    def protocol(self) -> str:
        """Protocol that ALPN selected (RFC 7301), or ""."""
        return self.sock.selected_alpn_protocol() or ""


async def handshake(
    sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, server_hostname: str | None = None
) -> TlsStream:
    """Do a TLS handshake on the socket, which is owned by the result, and closed after an error.

    :raises OSError: the handshake failed, or the connection broke.
    :raises TimeoutError: the handshake took more than 15 s.
    """
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
    """Relay bytes both ways until both sides have ended. `to_a` and `to_b` are sent first.

    :raises OSError: a connection broke.
    """
    tasks = [asyncio.create_task(_pump(a, b, to_b)), asyncio.create_task(_pump(b, a, to_a))]
    await gather_or_cancel(tasks)


async def _pump(source: Stream, target: Stream, first: bytes) -> None:
    if first:
        await target.write(first)
    while data := await source.read():
        await target.write(data)
    await target.send_eof()


async def gather_or_cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Await tasks; if one fails, cancel the others and re-raise its exception."""
    try:
        await asyncio.gather(*tasks)
    finally:
        await cancel_and_wait(*tasks)
