"""Reading the first bytes of a client without consuming them (MSG_PEEK), so that the relay reads them again."""

from __future__ import annotations

import asyncio
import socket

from agent.egress.tcp import sniff
from agent.egress.tcp.sniff import ClientHello, WireProtocol
from agent.egress.transport.sockets import wait_readable

_ESTABLISHED = 1  # linux/tcp_states.h


async def detect_protocol(client: socket.socket) -> WireProtocol | None:
    """Wait until the client's protocol is known and return it; None if the client ended without sending.

    :raises sniff.TooLarge: the first line is too long to tell.
    :raises ConnectionResetError: the client ended after too few bytes to tell.
    """
    data = await _peek(client, 0)
    while data:
        try:
            return sniff.classify(data)
        except sniff.Incomplete:
            data = await _peek(client, len(data))
    return None


async def read_client_hello(client: socket.socket, timeout_s: float) -> ClientHello:
    """Wait for the complete ClientHello of a TLS client and return it.

    :raises sniff.Malformed: it is not a valid ClientHello.
    :raises sniff.TooLarge: it is over 64 KiB.
    :raises TimeoutError: it is incomplete after `timeout_s`.
    :raises ConnectionResetError: the client ended before it was complete.
    """
    data = await _peek(client, 0)
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                return sniff.parse_hello(data)
            except sniff.Incomplete:
                data = await _peek(client, len(data))


async def _peek(client: socket.socket, known: int) -> bytes:
    """Wait for more than `known` bytes and return all of them; b"" if the client ended without sending.

    :raises ConnectionResetError: the client ended after `known` bytes.
    """
    # Otherwise the bytes that are known already would keep the socket readable (socket(7)).
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, known + 1)
    try:
        while True:
            try:
                data = client.recv(known + sniff.MAX_HELLO_BYTES, socket.MSG_PEEK)
            except BlockingIOError:
                data = b""
            else:
                if not data or len(data) > known:
                    return data
                if _has_ended(client):
                    raise ConnectionResetError("the client ended the connection")
            await wait_readable(client)
    finally:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def _has_ended(sock: socket.socket) -> bool:
    """Return whether the peer has closed its direction (tcp(7): the first byte of TCP_INFO is the state)."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _ESTABLISHED
