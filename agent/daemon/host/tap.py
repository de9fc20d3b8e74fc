"""Opens a tap that exists, inside its network namespace, for a VMM that may not do so itself.

Whoever attaches to a tap needs CAP_NET_ADMIN in its namespace (the kernel's Documentation/networking/tuntap.rst);
whoever has an open one needs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import threading

from agent.common.errors import VmmError
from agent.daemon.host.process import enter_netns

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000  # as agent.net makes them


async def open_tap(name: str, netns: str | None) -> int:
    """Returns a descriptor of the tap `name`, which the caller closes. :raises VmmError: it cannot be opened."""
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[int] = loop.create_future()

    def hand_over(fd: int, error: OSError | None) -> None:
        if not opened.done():
            if error is None:
                opened.set_result(fd)
            else:
                opened.set_exception(error)
        elif error is None:
            os.close(fd)  # whoever wanted it was cancelled

    def run() -> None:
        # Namespaces belong to threads: this one ends in the namespace that it enters.
        fd, problem = -1, None
        try:
            if netns is not None:
                enter_netns(netns)
            fd = attach(name)
        except OSError as error:
            problem = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(hand_over, fd, problem)

    threading.Thread(target=run, name="open-tap", daemon=True).start()
    try:
        return await opened
    except OSError as error:
        raise VmmError(f"cannot open the tap {name}: {error}", reason="TAP_FAILED") from error


def attach(name: str) -> int:
    """Returns a descriptor of the tap `name` in the thread's own namespace. :raises OSError:"""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except BaseException:
        os.close(fd)
        raise
    return fd
