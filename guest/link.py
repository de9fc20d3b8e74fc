"""The guest's end of the link to the host: a virtio-serial port, or a connection accepted on AF_VSOCK.

One host is served at a time. When the link is lost, the calls on it end and processes go on; the next session begins
with the handshake described at `wire.find_sync`.
"""

from __future__ import annotations

import os
import socket
import sys
from collections import deque

from guest import reactor, wire
from guest.call import Call, CallAbandoned
from guest.reactor import Task, Waiters
from guest.wire import WireError, find_sync
from guest.yamux import Buffer, Stream, YamuxError, YamuxSession

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from guest.call import Handler

_READ_BYTES = 128 << 10
# The largest write that virtio_console takes at once (port_fops_write in the kernel's drivers/char/virtio_console.c).
_WRITE_BYTES = 32 << 10
_ACCEPT_PAUSE_S = 0.1
_MAX_QUEUED_BYTES = 4 << 20  # of control frames, while the host does not read; data frames wait for `unblocked`


class LinkLost(Exception):
    """The host closed the link or does not read from it."""


class Link:
    """The link over one descriptor: sessions of one host after another.

    :param hang_up_is_final: the descriptor cannot be used after an EOF or error (a socket); false for a serial port.
    :param on_host: called when bytes arrive before a session.
    """

    def __init__(
        self,
        fd: int,
        handlers: dict[str, Handler],
        *,
        hang_up_is_final: bool,
        on_host: Callable[[], None] = lambda: None,
    ) -> None:
        self.unblocked = Waiters()
        self._on_host = on_host
        self._fd = fd
        self._handlers = handlers
        self._hang_up_is_final = hang_up_is_final
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._view = memoryview(bytearray(_READ_BYTES))
        # A virtio-serial port returns at most a page per buffer, so a read of many bytes needs a list of pages.
        self._pages = [self._view[start : start + 4096] for start in range(0, _READ_BYTES, 4096)]
        self._tasks: set[Task] = set()  # not by stream id: the next session may use an id before its old task has ended
        self._closed = False
        reactor.register(fd)
        self._writer = reactor.spawn(self._write_queue())

    @property
    def blocked(self) -> bool:
        """True while data frames must wait for `unblocked`, since the host has not read all earlier bytes."""
        return bool(self._queue)

    def write(self, data: Buffer) -> None:
        """Send `data`; queue a copy of the bytes that cannot be written at once.

        :raises LinkLost: the link is closed, or too many bytes are queued.
        """
        if self._closed:
            return
        written = 0
        if not self._queue:
            try:
                written = self._write_now(data)
            except OSError as error:
                raise LinkLost(str(error)) from None
        if written < len(data):
            self._queue.append(bytes(data[written:]))
            self._queued_bytes += len(data) - written
            if self._queued_bytes > _MAX_QUEUED_BYTES:
                raise LinkLost("the host does not read")

    def _write_now(self, data: Buffer) -> int:
        """Write without blocking; return the number of bytes written.

        :raises OSError: the link is closed.
        """
        try:
            if len(data) <= _WRITE_BYTES:
                return os.write(self._fd, data)
            view = memoryview(data)
            starts = range(0, len(data), _WRITE_BYTES)
            return os.writev(self._fd, [view[start : start + _WRITE_BYTES] for start in starts])
        except BlockingIOError:
            return 0

    async def _write_queue(self) -> None:
        while True:
            while self._queue:
                data = self._queue[0]
                try:
                    written = self._write_now(data)
                except OSError:  # the link is closed: the reader ends the session
                    break
                if not written:
                    break
                self._queued_bytes -= written
                if written == len(data):
                    self._queue.popleft()
                else:
                    self._queue[0] = data[written:]
            if not self._queue:
                self.unblocked.wake()
            await reactor.writable(self._fd)

    async def serve(self) -> None:
        """Serve one session after another; return when the descriptor cannot be used any more."""
        pending = bytearray()
        try:
            while True:
                try:
                    nonce = await self._handshake(pending)
                    await self._session(nonce, pending)
                except (LinkLost, YamuxError, WireError) as error:
                    print(f"link: {error}", file=sys.stderr, flush=True)
                    if self._hang_up_is_final and isinstance(error, LinkLost):
                        return
        finally:
            self.close()

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if not self._closed:
            self._closed = True
            self._writer.cancel()
            reactor.unregister(self._fd)
            os.close(self._fd)

    async def _handshake(self, pending: bytearray) -> bytes:
        while True:
            nonce = find_sync(pending, wire.SYNC_REQUEST)
            if nonce is not None:
                return nonce
            try:
                pending += await self._read()
                self._on_host()
            except LinkLost:
                pending.clear()
                if self._hang_up_is_final:
                    raise
                await reactor.readable(self._fd)  # no host is connected: epoll reports when one connects

    async def _session(self, nonce: bytes, pending: bytearray) -> None:
        self._queue.clear()
        self._queued_bytes = 0
        self.unblocked.wake()
        session = YamuxSession(client=False, write=self.write, on_stream=self._accept)
        try:
            self.write(wire.SYNC_REPLY + nonce)
            data: Buffer = bytes(pending)
            pending.clear()
            while True:
                try:
                    session.feed(data)
                except YamuxError:
                    pending += data  # may contain the handshake of the next session
                    raise
                data = await self._read()
        finally:
            session.abandon()
            for task in list(self._tasks):
                task.cancel()
            self._queue.clear()
            self._queued_bytes = 0

    async def _read(self) -> memoryview:
        """Return received bytes, at least one; the view is valid until the next call.

        :raises LinkLost: the host closed the link.
        """
        while True:
            try:
                size = os.readv(self._fd, self._pages)
            except BlockingIOError:
                await reactor.readable(self._fd)
                continue
            except OSError as error:
                raise LinkLost(str(error)) from None
            if not size:
                raise LinkLost("the host closed the link")
            if size == _READ_BYTES:
                await reactor.checkpoint()  # full: more bytes are waiting, so yield to the calls first
            return self._view[:size]

    def _accept(self, stream: Stream) -> None:
        call = Call(stream, self)
        task = reactor.spawn(call.answer(self._handlers))
        self._tasks.add(task)
        wake_reader = stream.on_readable

        def on_readable() -> None:
            if stream.was_reset:
                task.cancel()
            wake_reader()

        def on_done(task: Task) -> None:
            self._tasks.discard(task)
            if task.failure is not None and not isinstance(task.failure, CallAbandoned):
                print(f"call failed: {task.failure!r}", file=sys.stderr, flush=True)
            if task.failure is not None and not self._closed:
                try:
                    stream.reset()
                except LinkLost:
                    pass

        stream.on_readable = on_readable
        task.on_done = on_done


def open_serial(name: str) -> int:
    """Open the virtio-serial port `name`, found in sysfs since the guest has no udev; return its descriptor.

    :raises FileNotFoundError: the VM has no such port.
    """
    base = "/sys/class/virtio-ports"
    for port in sorted(os.listdir(base)):
        with open(f"{base}/{port}/name") as file:
            if file.read().strip() == name:
                return os.open(f"/dev/{port}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    raise FileNotFoundError(f"no virtio-serial port named {name}")


async def serve_serial(handlers: dict[str, Handler], on_host: Callable[[], None]) -> None:
    """Serve the host on the virtio-serial port; does not return. `on_host`: see `Link`."""
    await Link(open_serial(wire.SERIAL_NAME), handlers, hang_up_is_final=False, on_host=on_host).serve()


async def serve_vsock(handlers: dict[str, Handler], on_host: Callable[[], None]) -> None:
    """Serve the host on the AF_VSOCK port; a new connection replaces the one before. `on_host`: see `Link`."""
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    listener.bind((socket.VMADDR_CID_ANY, wire.LINK_PORT))
    listener.listen(8)
    # Processes of the guest can connect, too, by the loopback of vsock(7); only the host may call the server.
    await serve_listener(listener, handlers, on_host, lambda address: address[0] == socket.VMADDR_CID_HOST)


async def serve_listener(
    listener: socket.socket,
    handlers: dict[str, Handler],
    on_host: Callable[[], None] = lambda: None,
    is_host: Callable[[Any], bool] = lambda _: True,
) -> None:
    """Accept connections; serve the newest one from the host, and close those for which `is_host(address)` is false."""
    current: Task | None = None
    reactor.register(listener.fileno())
    while True:
        try:
            connection, address = listener.accept()
        except BlockingIOError:
            await reactor.readable(listener.fileno())
            continue
        except OSError as error:  # too many open files, or the client has disconnected
            print(f"link: cannot accept: {error}", file=sys.stderr, flush=True)
            await reactor.sleep(_ACCEPT_PAUSE_S)
            continue
        if not is_host(address):
            connection.close()
            continue
        connection.setblocking(False)
        if current is not None:
            current.cancel()
        current = reactor.spawn(Link(connection.detach(), handlers, hang_up_is_final=True, on_host=on_host).serve())
