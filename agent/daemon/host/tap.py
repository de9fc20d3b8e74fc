"""Opens a tap that exists, inside its network namespace, for a VMM that may not do so itself.

Whoever attaches to a tap needs CAP_NET_ADMIN in its namespace (the kernel's Documentation/networking/tuntap.rst);
whoever has an open one needs nothing.
"""

from __future__ import annotations

import fcntl
import os
import struct

from agent.common.errors import VmmError
from agent.daemon.host.syscalls import enter_netns
from agent.daemon.host.threads import run_in_thread

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000  # as agent.net makes them


async def open_tap(name: str, netns: str | None) -> int:
    """Returns a descriptor of the tap `name`, which the caller closes. :raises VmmError: it cannot be opened."""

    def enter_and_attach() -> int:
        if netns is not None:
            enter_netns(netns)
        return attach(name)

    try:
        return await run_in_thread("open-tap", enter_and_attach, discard=os.close)
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
