"""A virtio-serial port without a VMM: one end stays with the guest's server, hosts are plugged in and torn off."""

from __future__ import annotations

import asyncio
import contextlib
import socket


class SerialPort:
    """Relays between the guest's end and at most one host, which is torn off after a given number of bytes.

    What the guest writes while nobody is plugged in is lost, as with QEMU. The guest is never told that a host came or
    went: the worst case of a link that is dialled again.
    """

    def __init__(self, guest: socket.socket) -> None:
        guest.setblocking(False)
        self._guest = guest
        self._host: socket.socket | None = None
        self._sending = asyncio.Lock()  # what one host has sent comes before what the next one sends
        self._hosts: list[socket.socket] = []  # open to the end: a task may be about to write to one that was torn off
        self._left = {"up": 0, "down": 0}
        self._tasks = [asyncio.create_task(self._down())]

    def plug(self, *, up_bytes: int = 1 << 60, down_bytes: int = 1 << 60) -> socket.socket:
        """Returns the host's end of a new link."""
        self.tear()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._host = theirs
        self._hosts.append(theirs)
        self._left = {"up": up_bytes, "down": down_bytes}
        self._tasks.append(asyncio.create_task(self._up(theirs)))
        return ours

    def tear(self) -> None:
        """Tears off the host, if there is one."""
        if self._host is not None:
            with contextlib.suppress(OSError):
                self._host.shutdown(socket.SHUT_RDWR)
            self._host = None

    def _take(self, host: socket.socket, way: str, data: bytes) -> bytes:
        data = data[: self._left[way]] if host is self._host else b""
        self._left[way] -= len(data)
        return data

    async def _up(self, host: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(host, 16 << 10):
                async with self._sending:
                    await loop.sock_sendall(self._guest, self._take(host, "up", data))
                if host is self._host and not self._left["up"]:
                    self.tear()

    async def _down(self) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(self._guest, 16 << 10):
            host = self._host
            if host is None:
                continue
            with contextlib.suppress(OSError):
                await loop.sock_sendall(host, self._take(host, "down", data))
            if host is self._host and not self._left["down"]:
                self.tear()

    async def aclose(self) -> None:
        """Ends the relay."""
        self.tear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for host in self._hosts:
            host.close()
