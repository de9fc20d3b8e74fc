"""TCP connections from a local port to a port inside a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Any

from agent.cli.connect import rpc_error
from agent.cli.errors import print_warning
from agent.common.aio import cancel_and_wait
from agent.common.api_client import Api, opened

_CHUNK_BYTES = 64 << 10


class Forwarder:
    """Forwards the connections of one listening socket to `host`:`port` in a sandbox."""

    def __init__(self, api: Api, sandbox_id: str, host: str, port: int) -> None:
        self._api = api
        self._sandbox_id = sandbox_id
        self._host = host
        self._port = port
        self._connections: set[asyncio.Task[Any]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection (callback of asyncio.start_server); an error resets this connection alone."""
        import grpc

        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._forward(reader, writer)
        except grpc.aio.AioRpcError as error:
            failure = rpc_error(error)
            print_warning(f"a connection failed: {failure.message} ({failure.reason})")
            _reset(writer)
        except (ConnectionError, asyncio.CancelledError):
            _reset(writer)
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from sandboxd.v1 import network_pb2

        call = opened(self._api.network.Dial)
        first = network_pb2.DialRequest.Open(sandbox_id=self._sandbox_id, port=self._port, host=self._host)
        await call.write(network_pb2.DialRequest(open=first))
        feeder: asyncio.Task[None] | None = None
        try:
            async for response in call:
                if feeder is None:  # connected now; a write before that could hide the error of the connect
                    feeder = asyncio.create_task(_send(reader, call, network_pb2.DialRequest))
                writer.write(response.data)
                await writer.drain()
                if response.eof:
                    writer.write_eof()
        finally:
            call.cancel()
            if feeder is not None:
                await cancel_and_wait(feeder)

    async def aclose(self) -> None:
        """Reset every connection and wait for its end."""
        await cancel_and_wait(*self._connections)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a TCP reset (SO_LINGER, socket(7)), so that the client cannot mistake half an answer for all of it."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _send(reader: asyncio.StreamReader, call: Any, message: Any) -> None:
    """Send the client's bytes; at their end, half-close the call."""
    import grpc

    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # `_forward` raises the error of the call
        while data := await reader.read(_CHUNK_BYTES):
            await call.write(message(data=data))
        await call.done_writing()
