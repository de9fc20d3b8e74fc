"""Find the TCP ports on which a session of processes listens, in proc(5)."""

from __future__ import annotations

import os
import socket
import sys

_LISTEN = "0A"


def listener_of_session(session: int) -> tuple[str, int] | None:
    """Return (address, port) of the first listening socket of the processes of a session (setsid(2)), or None."""
    sockets = _listening()
    if not sockets:
        return None
    for pid in _members(session):
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue  # the process has ended
        for fd in descriptors:
            try:
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
            except OSError:
                continue
            if target in sockets:
                return sockets[target]
    return None


def _listening() -> dict[str, tuple[str, int]]:
    """Return "socket:[inode]" -> (address, port) of every listening TCP socket."""
    found = {}
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        try:
            with open(f"/proc/net/{name}") as file:
                lines = file.readlines()[1:]
        except FileNotFoundError:
            continue  # the kernel has no IPv6
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN:
                address, _, port = fields[1].partition(":")
                found[f"socket:[{fields[9]}]"] = _unpacked(family, address), int(port, 16)
    return found


def _unpacked(family: int, text: str) -> str:
    # 32-bit words in the byte order of the machine.
    words = [int(text[start : start + 8], 16).to_bytes(4, sys.byteorder) for start in range(0, len(text), 8)]
    return socket.inet_ntop(family, b"".join(words))


def _members(session: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session:
                found.append(int(name))
    return found
