"""One network namespace per sandbox: loopback, one tap for the VM, and no way out.

The process must not fork (gRPC does not survive it) and must not change its own namespace, so a throwaway thread enters
a fresh one (namespaces belong to threads, setns(2)), makes the tap there, and pins the namespace under /run/netns as
ip-netns(8) does. Opened later with `nsenter --net` or setns by whoever starts the VMM.
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
from agent.common.model import GATEWAY_IPV4, GATEWAY_IPV6, ID_PREFIX, TAP_NAME
from agent.daemon.host.syscalls import CLONE_NEWNET, MNT_DETACH, MS_BIND, mount, setns, umount, unshare
from agent.daemon.host.threads import run_in_thread

NETNS_DIR = Path("/run/netns")
# Every clone of a template must find the same gateway behind the same address, or its ARP cache is wrong.
TAP_MAC = "02:73:62:78:00:ff"
_TUNSETIFF, _TUNSETPERSIST = 0x400454CA, 0x400454CB
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
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
        _make_device()
        _set_up_device()
    except BaseException:
        _remove(path)
        raise


def _make_device() -> None:
    """Makes the tap."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        name = TAP_NAME.encode()
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", name, _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
        fcntl.ioctl(tun, _TUNSETPERSIST, 1)
    finally:
        os.close(tun)


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
        hint = "; a namespace of this name is left from before: remove it with `ip netns delete`"
    return HostError(f"cannot make network namespace {name}: {error}{hint}", reason="NETNS_FAILED")


def enter(fd: int) -> None:
    """Moves the calling thread into the network namespace of this descriptor. :raises OSError:"""
    setns(fd, CLONE_NEWNET)


async def run_in(fd: int, work: Callable[[], _T], what: str) -> _T:
    """Returns what `work` returns, from a thread in the network namespace `fd` that ends with it.

    It runs to its end, and a caller that is cancelled waits for that: what it undoes must come after it, and the
    descriptor stays open as long. :raises HostError: the kernel refused something.
    """

    def inside() -> _T:
        enter(fd)
        return work()

    try:
        return await run_to_completion(run_in_thread("netns-work", inside))
    except OSError as error:
        raise HostError(f"cannot {what}: {error}", reason="NETNS_FAILED") from error


def open_namespace(name: str) -> int:
    """Returns a descriptor of `/run/netns/<name>`. :raises HostError:"""
    try:
        return os.open(NETNS_DIR / name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"there is no network namespace {name}: {error.strerror}", reason="NETNS_FAILED") from error


async def make(name: str) -> None:
    """Makes the namespace `/run/netns/<name>` with its tap. :raises HostError: nothing is left behind."""
    try:
        await asyncio.shield(run_in_thread(f"netns-{name}", lambda: _make(NETNS_DIR / name)))
    except OSError as error:
        raise _explain(error, name) from error


def pin(name: str, pid: int) -> None:
    """Has `/run/netns/<name>` be the namespace of a process again, unless it is one: a service that systemd gives a
    mount namespace of its own loses what it mounted when it is started anew. :raises HostError:
    """
    try:
        _pin(NETNS_DIR / name, pid)
    except OSError as error:
        raise HostError(f"cannot pin network namespace {name}: {error}", reason="NETNS_FAILED") from error


async def remove(name: str) -> None:
    """Removes the namespace; its tap goes with it once no process is inside. Idempotent. :raises HostError:"""
    try:
        await asyncio.to_thread(_remove, NETNS_DIR / name)
    except OSError as error:
        raise HostError(f"cannot remove network namespace {name}: {error}", reason="NETNS_FAILED") from error


@asynccontextmanager
async def namespace(name: str) -> AsyncIterator[str]:
    """Makes a namespace, yields its name, and removes it."""
    await make(name)
    try:
        yield name
    finally:
        await remove(name)


def list_ours() -> list[str]:
    """Returns the names of all namespaces on this host that look like a sandbox's."""
    try:
        return sorted(entry.name for entry in NETNS_DIR.iterdir() if entry.name.startswith(ID_PREFIX))
    except FileNotFoundError:
        return []
