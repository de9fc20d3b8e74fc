"""Listening sockets for one guest (DNS, TCP proxy), bound here with privileges and served by the egress process."""

from __future__ import annotations

import contextlib
import socket

from agent.daemon.network.kernel.ruleset import DNS_PORT, GATEWAY4, GATEWAY6, PROXY_PORT

_BACKLOG = 1024
_IP_TRANSPARENT, _IPV6_TRANSPARENT, _IPV6_FREEBIND = 19, 75, 78  # ip(7); linux/in6.h
_V4, _V6 = socket.AF_INET, socket.AF_INET6


def make() -> list[socket.socket]:
    """Bind the sockets in the calling thread's namespace, in the order of `agent.egress.control_protocol.SOCKETS`.

    Without IPv6 in the kernel, only the first half is returned.

    :raises OSError: the kernel refused.
    """
    with contextlib.ExitStack() as stack:
        made: list[socket.socket] = []
        for family, gateway in ((_V4, GATEWAY4), (_V6, GATEWAY6)):
            try:
                with socket.socket(family):
                    pass
            except OSError:
                break
            for kind, address, port in (
                (socket.SOCK_DGRAM, gateway, DNS_PORT),
                (socket.SOCK_STREAM, gateway, DNS_PORT),
                (socket.SOCK_STREAM, "::" if family == _V6 else "0.0.0.0", PROXY_PORT),  # noqa: S104  in a namespace of its own
            ):
                sock = stack.enter_context(socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC))
                _bind(sock, address, port)
                made.append(sock)
        stack.pop_all()
        return made
    raise AssertionError("unreachable: nothing above suppresses exceptions")


def _bind(sock: socket.socket, address: str, port: int) -> None:
    v6 = sock.family == _V6
    # Connections in TIME_WAIT that a dead egress process left must not keep the next one from listening.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if v6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # The kernel activates a new address asynchronously, in a worker.
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
    if port == PROXY_PORT:
        level, option = (socket.IPPROTO_IPV6, _IPV6_TRANSPARENT) if v6 else (socket.IPPROTO_IP, _IP_TRANSPARENT)
        sock.setsockopt(level, option, 1)
    sock.bind((address, port))
    if sock.type == socket.SOCK_STREAM:
        sock.listen(_BACKLOG)
