"""Relay bytes between a client's connection and a stream into a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc

from agent.common.aio import cancel_and_wait
from agent.gateway.nodes.guest_stream import GuestStream

READ_BYTES = 256 << 10


async def relay(reader: Any, writer: Any, stream: GuestStream) -> None:
    """Relay bytes in both directions until the guest ends its direction.

    The end of the client's direction is passed on to the guest; the end of the guest's direction closes the connection,
    because clients do not use the half-close of TLS.

    :param reader: stream reader of asyncio or asyncssh; `writer` likewise.
    """

    async def upstream() -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, ConnectionError):
            while data := await reader.read(READ_BYTES):
                await stream.write(data)
            await stream.write_eof()

    sending = asyncio.create_task(upstream())
    try:
        with contextlib.suppress(grpc.aio.AioRpcError):
            while data := await stream.read():
                writer.write(data)
                await writer.drain()
    finally:
        stream.close()
        await cancel_and_wait(sending)
