"""Network namespaces of sandboxes: loopback, one tap for the VM, and no link to the outside.

The process must not fork (gRPC does not survive it) and must not change its own namespace, so a thread that ends
afterwards enters a new one (namespaces belong to threads, setns(2)), makes the tap, and pins the namespace under
/run/netns as ip-netns(8) does. The VMM is started in it later, by setns or `nsenter --net`.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from agent.common.aio import run_to_completion
from agent.common.errors import HostError
from agent.common.model import GATEWAY_IPV4, GATEWAY_IPV6, TAP_NAME
from agent.daemon.host.syscalls import CLONE_NEWNET, MNT_DETACH, MS_BIND, mount, setns, umount, unshare
from agent.daemon.host.tap import make_tap
from agent.daemon.host.threads import run_in_thread

NETNS_DIR = Path("/run/netns")
# The same for all sandboxes: a template's ARP cache must be right for its clones.
TAP_MAC = "02:73:62:78:00:ff"
_SIOCSIFHWADDR, _SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCGIFINDEX = (
    0x8924, 0x8913, 0x8914, 0x8916, 0x891C, 0x8933,
)  # fmt: skip
_ARPHRD_ETHER = 1
_IFF_UP = 1

_T = TypeVar("_T")


def _make(path: Path) -> None:
    NETNS_DIR.mkdir(mode=0o755, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    try:
        unshare(CLONE_NEWNET)
        own = f"/proc/self/task/{threading.get_native_id()}/ns/net"
        mount(own, path, "none", MS_BIND)
        make_tap(TAP_NAME)
        _set_up_device()
    except BaseException:
        _remove(path)
        raise


def _set_up_device() -> None:
    name = TAP_NAME.encode()
    mac = bytes.fromhex(TAP_MAC.replace(":", ""))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFHWADDR, struct.pack("16sH6s16x", name, _ARPHRD_ETHER, mac))
        _set_ipv4(sock, name, GATEWAY_IPV4)
        for interface in (b"lo", name):
            request = struct.pack("16sH22x", interface, 0)
            (flags,) = struct.unpack_from("H", fcntl.ioctl(sock, _SIOCGIFFLAGS, request), 16)
            fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", interface, flags | _IFF_UP))
    if Path("/proc/sys/net/ipv6").exists():
        _set_ipv6(name)


def _set_ipv4(sock: socket.socket, name: bytes, cidr: str) -> None:
    address, _, prefix = cidr.partition("/")
    mask = struct.pack(">I", 0xFFFF_FFFF << (32 - int(prefix)) & 0xFFFF_FFFF)
    for request, value in ((_SIOCSIFADDR, socket.inet_aton(address)), (_SIOCSIFNETMASK, mask)):
        fcntl.ioctl(sock, request, struct.pack("=16sHH4s16x", name, socket.AF_INET, 0, value))


def _set_ipv6(name: bytes) -> None:
    address, _, prefix = GATEWAY_IPV6.partition("/")
    for setting, value in (("accept_ra", "0"), ("accept_dad", "0")):
        Path(f"/proc/sys/net/ipv6/conf/{TAP_NAME}/{setting}").write_text(value)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        (index,) = struct.unpack_from("i", fcntl.ioctl(sock, _SIOCGIFINDEX, struct.pack("16s24x", name)), 16)
        packed = socket.inet_pton(socket.AF_INET6, address)
        fcntl.ioctl(sock, _SIOCSIFADDR, struct.pack("=16sIi", packed, int(prefix), index))


def _pin(path: Path, pid: int) -> None:
    if not os.path.ismount(path):
        NETNS_DIR.mkdir(mode=0o755, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o444))
        mount(f"/proc/{pid}/ns/net", path, "none", MS_BIND)


def _remove(path: Path) -> None:
    try:
        umount(path, MNT_DETACH)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):  # nothing is mounted there, or nothing is there
            raise
    path.unlink(missing_ok=True)


def _explain(error: OSError, name: str) -> HostError:
    hint = ""
    if error.errno in (errno.EPERM, errno.EACCES):
        hint = "; sandboxd must run as root, with CAP_NET_ADMIN and CAP_SYS_ADMIN"
    elif error.errno == errno.ENOENT and "tun" in str(error.filename):
        hint = "; load the kernel module tun"
    elif error.errno == errno.EEXIST:
        hint = "; a namespace of this name exists already: remove it with `ip netns delete`"
    return HostError(f"cannot make network namespace {name}: {error}{hint}", reason="NETNS_FAILED")


def enter(fd: int) -> None:
    """Move the calling thread into the network namespace of a descriptor.

    :raises OSError: the kernel refused.
    """
    setns(fd, CLONE_NEWNET)


async def run_in(fd: int, work: Callable[[], _T], what: str) -> _T:
    """Run `work` in a new thread in the network namespace `fd`; return its result.

    Runs to completion: a cancelled caller waits for the end, so that its cleanup comes after the work and `fd` stays
    open meanwhile.

    :param what: the purpose, for the error message.
    :raises HostError: the kernel refused something.
    """

    def inside() -> _T:
        enter(fd)
        return work()

    try:
        return await run_to_completion(run_in_thread("netns-work", inside))
    except OSError as error:
        raise HostError(f"cannot {what}: {error}", reason="NETNS_FAILED") from error


def open_namespace(name: str) -> int:
    """Return a descriptor of `/run/netns/<name>`.

    :raises HostError: the namespace does not exist.
    """
    try:
        return os.open(NETNS_DIR / name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"no network namespace {name}: {error.strerror}", reason="NETNS_FAILED") from error


async def make(name: str) -> None:
    """Make the namespace `/run/netns/<name>` with its tap.

    :raises HostError: the kernel refused; nothing is left.
    """
    try:
        await asyncio.shield(run_in_thread(f"netns-{name}", lambda: _make(NETNS_DIR / name)))
    except OSError as error:
        raise _explain(error, name) from error


def pin(name: str, pid: int) -> None:
    """Mount the namespace of a process at `/run/netns/<name>` again, unless a namespace is mounted there.

    A service in a mount namespace of its own, as systemd makes them, loses its mounts when it is restarted.

    :raises HostError: the kernel refused.
    """
    try:
        _pin(NETNS_DIR / name, pid)
    except OSError as error:
        raise HostError(f"cannot pin network namespace {name}: {error}", reason="NETNS_FAILED") from error


async def remove(name: str) -> None:
    """Remove the namespace; the kernel frees it, with its tap, once no process is inside. Idempotent.

    :raises HostError: the kernel refused.
    """
    try:
        await asyncio.to_thread(_remove, NETNS_DIR / name)
    except OSError as error:
        raise HostError(f"cannot remove network namespace {name}: {error}", reason="NETNS_FAILED") from error


@asynccontextmanager
async def namespace(name: str) -> AsyncIterator[str]:
    """Make a namespace, yield its name, and remove it afterwards.

    :raises HostError: the kernel refused.
    """
    await make(name)
    try:
        yield name
    finally:
        await remove(name)
