"""Serve net.dial: connect to a TCP server in the guest, and relay the connection to the host."""

from __future__ import annotations

import errno
import os
import socket

from guest import reactor
from guest.call import CHUNK_BYTES, HEADROOM, Call, os_error
from guest.wire import CallError, Frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.call import Handler

_CONNECT_TIMEOUT_S = 10.0


def _address(req: dict[str, object]) -> tuple[int, str, int]:
    host, port = str(req.get("host") or "127.0.0.1"), req.get("port")
    if not isinstance(port, int) or not 1 <= port <= 65535:
        raise CallError("INVALID", "port must be from 1 to 65535")
    host = {"localhost": "127.0.0.1"}.get(host, host.strip("[]"))
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return family, host, port
    raise CallError("INVALID", f"{host[:80]!r} is not an IP address; host names are not resolved here")


async def _connect(sock: socket.socket, host: str, port: int) -> None:
    number = sock.connect_ex((host, port))
    if number == errno.EINPROGRESS:
        timer = reactor.spawn(_wake_later(sock.fileno()))
        try:
            await reactor.writable(sock.fileno())
        finally:
            timer.cancel()
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not number and not _connected(sock):
            number = errno.ETIMEDOUT
    if number:
        raise os_error(OSError(number, os.strerror(number)), f"{host} port {port}")


async def _wake_later(fd: int) -> None:
    await reactor.sleep(_CONNECT_TIMEOUT_S)
    reactor.poke_writer(fd)


def _connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


async def _dial(call: Call) -> dict[str, object]:
    family, host, port = _address(call.req)
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
        reactor.register(sock.fileno())
        try:
            await _connect(sock, host, port)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return await _relay(call, sock)
        finally:
            reactor.unregister(sock.fileno())


async def relay_channel(call: Call, sock: socket.socket) -> dict[str, object]:
    """Relay bytes between the host and a connected socket until both sides have sent EOF; close the socket."""
    with sock:
        reactor.register(sock.fileno())
        try:
            return await _relay(call, sock)
        finally:
            reactor.unregister(sock.fileno())


async def _relay(call: Call, sock: socket.socket) -> dict[str, object]:
    await call.send_json(Frame.EVENT, {"connected": True})
    finished = reactor.Waiters()
    sender = reactor.spawn(_to_server(call, sock, finished))
    try:
        await _from_server(call, sock.fileno())
        while not sender.done:
            await finished.wait()
        return {}
    finally:
        sender.cancel()


async def _from_server(call: Call, fd: int) -> None:
    buffer = bytearray(HEADROOM + CHUNK_BYTES)
    view = memoryview(buffer)[HEADROOM:]
    while True:
        try:
            size = os.readv(fd, [view])
        except BlockingIOError:
            await reactor.readable(fd)
            continue
        except ConnectionResetError:
            size = 0
        if not size:
            await call.send_eof()
            return
        await call.send_buffer(Frame.DATA, buffer, size)


async def _to_server(call: Call, sock: socket.socket, finished: reactor.Waiters) -> None:
    try:
        while True:
            kind, data = await call.recv()
            if kind == Frame.EOF:
                sock.shutdown(socket.SHUT_WR)
                return
            view = memoryview(data)
            while view:
                try:
                    view = view[os.write(sock.fileno(), view) :]
                except BlockingIOError:
                    await reactor.writable(sock.fileno())
    except OSError:
        return  # the server has closed the connection: its last bytes are still relayed to the host
    finally:
        finished.wake()


OPS: dict[str, Handler] = {"net.dial": _dial}
