"""Create TAP devices, and open existing ones inside their network namespace, for a VMM without CAP_NET_ADMIN.

Attaching to a TAP needs that capability (the kernel's Documentation/networking/tuntap.rst); using an open descriptor
needs none.
"""

from __future__ import annotations

import fcntl
import os
import struct

from agent.common.errors import VmmError
from agent.daemon.host.syscalls import enter_netns
from agent.daemon.host.threads import run_in_thread

_TUNSETIFF, _TUNSETPERSIST = 0x400454CA, 0x400454CB
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


async def open_tap(name: str, netns: str | None) -> int:
    """Return a descriptor of the TAP `name`; the caller closes it.

    :param netns: name of the network namespace under /run/netns; None: the agent's.
    :raises VmmError: the TAP cannot be opened (TAP_FAILED).
    """

    def enter_and_attach() -> int:
        if netns is not None:
            enter_netns(netns)
        return attach(name)

    try:
        return await run_in_thread("open-tap", enter_and_attach, discard=os.close)
    except OSError as error:
        raise VmmError(f"cannot open the tap {name}: {error}", reason="TAP_FAILED") from error


def make_tap(name: str) -> None:
    """Create a persistent TAP in the network namespace of the calling thread.

    :raises OSError: the kernel refused.
    """
    fd = attach(name)  # creates a TAP that does not exist
    try:
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    finally:
        os.close(fd)


def attach(name: str) -> int:
    """Return a descriptor of the TAP `name` in the network namespace of the calling thread.

    :raises OSError: the TAP does not exist, or the agent lacks CAP_NET_ADMIN.
    """
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except BaseException:
        os.close(fd)
        raise
    return fd
