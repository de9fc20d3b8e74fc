"""Byte streams into a sandbox: a TCP port of its guest, what the guest may reach, or the channel of a process."""

from __future__ import annotations

from typing import Any

import grpc

from agent.common.api_client import Api, opened
from sandboxd.v1 import network_pb2 as pb

_WRITE_BYTES = 256 << 10


def why(error: BaseException) -> str:
    """Returns what to say of a connection that failed."""
    return error.details() or "lost" if isinstance(error, grpc.aio.AioRpcError) else str(error)


class GuestStream:
    """One connection. Made with `dial` or `channel`."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._eof = False

    @classmethod
    async def dial(cls, api: Api, sandbox_id: str, host: str, port: int) -> GuestStream:
        """Connects to an address of the guest or beyond. :raises grpc.aio.AioRpcError: see NetworkService.Dial."""
        return await cls._open(api, pb.DialRequest.Open(sandbox_id=sandbox_id, host=host, port=port))

    @classmethod
    async def channel(cls, api: Api, sandbox_id: str, process_id: int) -> GuestStream:
        """Takes the channel of a process. :raises grpc.aio.AioRpcError: it has none, or somebody else has it."""
        return await cls._open(api, pb.DialRequest.Open(sandbox_id=sandbox_id, process_id=process_id))

    @classmethod
    async def _open(cls, api: Api, target: pb.DialRequest.Open) -> GuestStream:
        call = opened(api.network.Dial)
        try:
            await call.write(pb.DialRequest(open=target))
            await call.read()  # empty: the connection is there
        except BaseException:
            call.cancel()
            raise
        return cls(call)

    async def read(self) -> bytes:
        """Returns the next bytes; b"" at the end. :raises grpc.aio.AioRpcError: the connection is lost."""
        while not self._eof:
            message: Any = await self._call.read()
            if not isinstance(message, pb.DialResponse) or message.eof:
                self._eof = True
            elif message.data:
                data: bytes = message.data
                return data
        return b""

    async def write(self, data: bytes) -> None:
        """Sends bytes; waits while the other side does not read. :raises grpc.aio.AioRpcError, InvalidStateError:"""
        for start in range(0, len(data), _WRITE_BYTES):
            await self._call.write(pb.DialRequest(data=data[start : start + _WRITE_BYTES]))

    async def write_eof(self) -> None:
        """Ends our bytes; the other direction goes on."""
        await self._call.done_writing()

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        self._call.cancel()
