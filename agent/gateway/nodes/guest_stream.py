"""Byte stream into a sandbox through the API's call Dial: a TCP connection of the guest, or a process's channel."""

from __future__ import annotations

from typing import Any

import grpc

from agent.common.api_client import Api, opened
from sandboxd.v1 import network_pb2 as pb

_WRITE_BYTES = 256 << 10


def describe_error(error: BaseException) -> str:
    """Return one line for a client about a connection that failed."""
    return error.details() or "lost" if isinstance(error, grpc.aio.AioRpcError) else str(error)


class GuestStream:
    """One stream, made by `dial` or `channel`."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._eof = False

    @classmethod
    async def dial(cls, api: Api, sandbox_id: str, host: str, port: int) -> GuestStream:
        """Connect to a TCP address from inside the sandbox: its own ports, or what its egress policy allows.

        :raises grpc.aio.AioRpcError: see NetworkService.Dial.
        """
        return await cls._open(api, pb.DialRequest.Open(sandbox_id=sandbox_id, host=host, port=port))

    @classmethod
    async def channel(cls, api: Api, sandbox_id: str, process_id: int) -> GuestStream:
        """Open the channel (descriptor 3) of a process.

        :raises grpc.aio.AioRpcError: the process has no channel, or another client has opened it.
        """
        return await cls._open(api, pb.DialRequest.Open(sandbox_id=sandbox_id, process_id=process_id))

    @classmethod
    async def _open(cls, api: Api, target: pb.DialRequest.Open) -> GuestStream:
        call = opened(api.network.Dial)
        try:
            await call.write(pb.DialRequest(open=target))
            await call.read()  # an empty first message: the connection is established
        except BaseException:
            call.cancel()
            raise
        return cls(call)

    async def read(self) -> bytes:
        """Return the next bytes, or b"" at the end.

        :raises grpc.aio.AioRpcError: the connection is lost.
        """
        while not self._eof:
            message: Any = await self._call.read()
            if not isinstance(message, pb.DialResponse) or message.eof:
                self._eof = True
            elif message.data:
                data: bytes = message.data
                return data
        return b""

    async def write(self, data: bytes) -> None:
        """Send bytes; wait while the peer does not read.

        :raises grpc.aio.AioRpcError: the connection is lost.
        :raises asyncio.InvalidStateError: the call has ended.
        """
        for start in range(0, len(data), _WRITE_BYTES):
            await self._call.write(pb.DialRequest(data=data[start : start + _WRITE_BYTES]))

    async def write_eof(self) -> None:
        """Close the sending direction; the receiving direction stays open."""
        await self._call.done_writing()

    def close(self) -> None:
        """Close both directions. Idempotent."""
        self._call.cancel()
