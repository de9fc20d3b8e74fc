"""Looks at what a client said first and leaves it in its socket: whoever serves the connection reads it anew."""

from __future__ import annotations

import asyncio
import socket

from agent.egress.tcp import sniff
from agent.egress.tcp.sniff import ClientHello, WireProtocol
from agent.egress.transport.sockets import wait_readable

_ESTABLISHED = 1  # linux/tcp_states.h


async def detect_protocol(client: socket.socket) -> WireProtocol | None:
    """Returns what a client speaks, once that can be told; None if it ended without a word.

    :raises sniff.TooLarge: :raises ConnectionResetError: it ended before it could be told.
    """
    data = await _peek(client, 0)
    while data:
        try:
            return sniff.classify(data)
        except sniff.Incomplete:
            data = await _peek(client, len(data))
    return None


async def read_client_hello(client: socket.socket, timeout_s: float) -> ClientHello:
    """Returns the TLS hello of a client that speaks TLS.

    :raises sniff.Malformed, sniff.TooLarge, TimeoutError: :raises ConnectionResetError: it ended before its end.
    """
    data = await _peek(client, 0)
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                return sniff.parse_hello(data)
            except sniff.Incomplete:
                data = await _peek(client, len(data))


async def _peek(client: socket.socket, known: int) -> bytes:
    """Returns what has come, more than `known` bytes; b"" if the client ended without a word.

    :raises ConnectionResetError: it ended after what is known.
    """
    # Without it, bytes that are known would wake us again and again (socket(7)).
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
    """Whether the other side sent its last byte (tcp(7), TCP_INFO's first byte is the state)."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _ESTABLISHED
