"""Connections that are carried into a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Any

from agent.cli.connect import described_address
from agent.cli.errors import from_rpc, warn
from agent.common.api_client import Api, opened

_PIECE_BYTES = 64 << 10


class Forwarder:
    """The connections of one listening port."""

    def __init__(self, api: Api, sandbox_id: str, host: str, port: int) -> None:
        self._api = api
        self._sandbox_id = sandbox_id
        self._host = host
        self._port = port
        self._connections: set[asyncio.Task[Any]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carries one connection; an error ends that one alone."""
        import grpc

        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._carry(reader, writer)
        except grpc.aio.AioRpcError as error:
            failure = from_rpc(error, described_address())
            warn(f"a connection failed: {failure.message} ({failure.reason})")
            _reset(writer)
        except (ConnectionError, asyncio.CancelledError):
            _reset(writer)
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from sandboxd.v1 import network_pb2

        call = opened(self._api.network.Dial)
        first = network_pb2.DialRequest.Open(sandbox_id=self._sandbox_id, port=self._port, host=self._host)
        await call.write(network_pb2.DialRequest(open=first))
        feeder: asyncio.Task[None] | None = None
        try:
            async for response in call:
                if feeder is None:  # it is connected; writing earlier could hide why it is not
                    feeder = asyncio.create_task(_feed(reader, call, network_pb2.DialRequest))
                writer.write(response.data)
                await writer.drain()
                if response.eof:
                    writer.write_eof()
        finally:
            call.cancel()
            if feeder is not None:
                feeder.cancel()
                await asyncio.gather(feeder, return_exceptions=True)

    async def aclose(self) -> None:
        """Ends every connection."""
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection with a reset (SO_LINGER of socket(7)): nobody may take half of an answer for all of it."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _feed(reader: asyncio.StreamReader, call: Any, message: Any) -> None:
    """Carries the client's bytes; their end is the end of the call's requests (half-close)."""
    import grpc

    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # the reading side reports it
        while data := await reader.read(_PIECE_BYTES):
            await call.write(message(data=data))
        await call.done_writing()
