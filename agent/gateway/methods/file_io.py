"""Methods that read and write whole files, in one message or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from agent.common.aio import cancel_and_wait
from agent.common.api_client import is_cut_off, opened
from agent.gateway.errors import CallError
from agent.gateway.jsonrpc.connection import RpcConnection
from agent.gateway.jsonrpc.streams import InboundStream
from agent.gateway.methods.files import apply_umask, file_fields
from agent.gateway.methods.params import path_params
from sandboxd.v1 import file_pb2 as pb

_WRITE_BYTES = 256 << 10
_FILE_MODE = 0o666


async def _contents(connection: RpcConnection, path: str) -> bytes:
    request = pb.ReadFileRequest(**file_fields(connection), path=path)
    return b"".join([piece.data async for piece in connection.session.api.files.ReadFile(request)])


async def read_file(connection: RpcConnection, params: path_params.Read) -> object:
    """Return the bytes of a file."""
    return await _contents(connection, params.path)


async def read_text_file(connection: RpcConnection, params: path_params.Read) -> object:
    """Return the text of a file; invalid UTF-8 is replaced, as TextDecoder does."""
    return (await _contents(connection, params.path)).decode(errors="replace")


async def write_file(connection: RpcConnection, params: path_params.Write) -> object:
    """Write bytes from the request or from a stream."""
    await _write(connection, params, params.content)
    return None


async def write_text_file(connection: RpcConnection, params: path_params.WriteText) -> object:
    """Write text from the request or from a stream."""
    await _write(connection, params, None if params.content is None else params.content.encode())
    return None


def _disposition(options: path_params.WriteOptions) -> tuple[Any, bool]:
    """Return the disposition of the write, and whether the file must exist."""
    kinds = pb.WriteFileRequest.Open
    if options.create_new:
        return kinds.DISPOSITION_CREATE_NEW, False
    must_exist = options.create is False
    return (kinds.DISPOSITION_APPEND if options.append else kinds.DISPOSITION_TRUNCATE), must_exist


async def _write(
    connection: RpcConnection, params: path_params.Write | path_params.WriteText, content: bytes | None
) -> None:
    options = params.options or path_params.WriteOptions()
    disposition, must_exist = _disposition(options)
    opening = pb.WriteFileRequest.Open(
        **file_fields(connection), path=params.path, disposition=disposition, must_exist=must_exist,
        mode=apply_umask(connection, None, _FILE_MODE),
    )  # fmt: skip
    if content is not None:
        await write_stream(connection, opening, _pieces(content))
    elif params.content_stream_id is not None:
        async with connection.streams.inbound(params.content_stream_id) as source:
            await write_stream(connection, opening, stream_pieces(source))
    else:
        raise CallError("TypeError", "content or contentStreamId must be given")
    if options.mode is not None:
        request = pb.ChmodRequest(**file_fields(connection), path=params.path, mode=options.mode & 0o7777)
        await connection.session.api.files.Chmod(request)


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    view = memoryview(content)
    for start in range(0, len(view), _WRITE_BYTES):
        yield bytes(view[start : start + _WRITE_BYTES])


async def stream_pieces(source: InboundStream) -> AsyncIterator[bytes]:
    """Yield the bytes of a stream from the client.

    :raises CallError: the client ended it with an error, or disconnected.
    """
    while data := await source.read():
        yield data


async def write_stream(
    connection: RpcConnection, opening: pb.WriteFileRequest.Open, pieces: AsyncIterator[bytes]
) -> None:
    """Write a file from pieces.

    :raises grpc.aio.AioRpcError: the file cannot be written.
    :raises CallError: the source failed, or the sandbox ended the call without a status.
    """
    call = opened(connection.session.api.files.WriteFile)

    async def feed() -> None:
        # Writes to a call that has ended fail like this; `answer` raises the call's status.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(pb.WriteFileRequest(open=opening))
            async for piece in pieces:
                await call.write(pb.WriteFileRequest(data=piece))
            await call.done_writing()

    async def answer() -> None:
        try:
            await call
        except grpc.aio.AioRpcError as error:
            if is_cut_off(error):
                raise CallError(
                    "Error", f"the sandbox stopped the write of {opening.path}: is its disk full?"
                ) from error
            raise

    feeding, answering = asyncio.create_task(feed()), asyncio.create_task(answer())
    try:
        await asyncio.wait({feeding, answering}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            await feeding  # raises the error of the source, if any
        await answering
    finally:
        call.cancel()
        await cancel_and_wait(feeding, answering)
