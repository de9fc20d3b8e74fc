"""Open file in a sandbox: one OpenFile call of the API, which lasts as long as the file is open."""

from __future__ import annotations

import asyncio
from typing import Any

from agent.common.api_client import Api, opened
from agent.gateway.errors import CallError, call_error_from_errno
from sandboxd.v1 import file_pb2 as pb


class GuestFile:
    """One open file, made by `open`. Concurrent operations run in the order of their calls."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, api: Api, request: pb.OpenFileRequest.Open) -> GuestFile:
        """Open a file.

        :raises CallError: the guest refused, for example with ENOENT.
        :raises grpc.aio.AioRpcError: the call failed.
        """
        file = cls(opened(api.files.OpenFile))
        try:
            await file.request(open=request)
        except BaseException:
            file.close()
            raise
        return file

    async def request(self, **operation: Any) -> pb.OpenFileResponse:
        """Run one operation. :param operation: one field of OpenFileRequest.

        :raises CallError: the operation failed, or the sandbox has closed the file.
        :raises grpc.aio.AioRpcError: the call failed.
        """
        async with self._turn:
            await self._call.write(pb.OpenFileRequest(**operation))
            response: Any = await self._call.read()
        if not isinstance(response, pb.OpenFileResponse):
            await self._call.code()
            raise CallError("BadResource", "the file was closed by the sandbox", code="EBADF")
        if response.HasField("error"):
            raise call_error_from_errno(response.error.reason, response.error.message)
        return response

    def close(self) -> None:
        """Close the file; a running operation fails. Idempotent."""
        self._call.cancel()
