"""The methods that read and write whole files, as one message or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from agent.common.api_client import is_cut_off, opened
from agent.gateway.errors import Failure
from agent.gateway.jsonrpc import schema
from agent.gateway.jsonrpc.connection import Connection, method
from agent.gateway.methods.files import masked, within
from sandboxd.v1 import file_pb2 as pb

_WRITE_BYTES = 256 << 10
_FILE_MODE = 0o666


async def _contents(connection: Connection, path: str) -> bytes:
    request = pb.ReadFileRequest(**within(connection), path=path)
    return b"".join([piece.data async for piece in connection.attachment.api.files.ReadFile(request)])


@method("readFile", schema.Read)
async def read_file(connection: Connection, params: schema.Read) -> object:
    """The bytes of a file."""
    return await _contents(connection, params.path)


@method("readTextFile", schema.Read)
async def read_text_file(connection: Connection, params: schema.Read) -> object:
    """The text of a file; what is not UTF-8 is replaced, as a TextDecoder does it."""
    return (await _contents(connection, params.path)).decode(errors="replace")


@method("writeFile", schema.Write)
async def write_file(connection: Connection, params: schema.Write) -> object:
    """Bytes of the request, or of a stream."""
    await _write(connection, params, params.content)
    return None


@method("writeTextFile", schema.WriteText)
async def write_text_file(connection: Connection, params: schema.WriteText) -> object:
    """Text of the request, or of a stream."""
    await _write(connection, params, None if params.content is None else params.content.encode())
    return None


def _disposition(options: schema.WriteOptions) -> tuple[Any, bool]:
    """Returns (disposition, whether the file must exist)."""
    kinds = pb.WriteFileRequest.Open
    if options.create_new:
        return kinds.DISPOSITION_CREATE_NEW, False
    must_exist = options.create is False
    return (kinds.DISPOSITION_APPEND if options.append else kinds.DISPOSITION_TRUNCATE), must_exist


async def _write(connection: Connection, params: schema.Write | schema.WriteText, content: bytes | None) -> None:
    options = params.options or schema.WriteOptions()
    disposition, must_exist = _disposition(options)
    begin = pb.WriteFileRequest.Open(
        **within(connection), path=params.path, disposition=disposition, must_exist=must_exist,
        mode=masked(connection, None, _FILE_MODE),
    )  # fmt: skip
    if content is not None:
        await write_stream(connection, begin, _pieces(content))
    elif params.content_stream_id is not None:
        async with connection.inbound(params.content_stream_id) as source:
            await write_stream(connection, begin, source_pieces(source))
    else:
        raise Failure("TypeError", "content or contentStreamId must be given")
    if options.mode is not None:
        request = pb.ChmodRequest(**within(connection), path=params.path, mode=options.mode & 0o7777)
        await connection.attachment.api.files.Chmod(request)


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    view = memoryview(content)
    for start in range(0, len(view), _WRITE_BYTES):
        yield bytes(view[start : start + _WRITE_BYTES])


async def source_pieces(source: Any) -> AsyncIterator[bytes]:
    """Yields the bytes of a stream that the client writes. :raises Failure: the client gave it up."""
    while data := await source.read():
        yield data


async def write_stream(connection: Connection, begin: pb.WriteFileRequest.Open, pieces: AsyncIterator[bytes]) -> None:
    """Writes a file from pieces. :raises grpc.aio.AioRpcError: :raises Failure: the source failed."""
    call = opened(connection.attachment.api.files.WriteFile)

    async def feed() -> None:
        # A call that has ended fails in one of these ways here; its answer says why it ended.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(pb.WriteFileRequest(open=begin))
            async for piece in pieces:
                await call.write(pb.WriteFileRequest(data=piece))
            await call.done_writing()

    async def answer() -> None:
        try:
            await call
        except grpc.aio.AioRpcError as error:
            if is_cut_off(error):
                raise Failure("Error", f"the sandbox stopped taking {begin.path}: is its disk full?") from error
            raise

    feeding, answering = asyncio.create_task(feed()), asyncio.create_task(answer())
    try:
        await asyncio.wait({feeding, answering}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            await feeding  # it may have failed
        await answering
    finally:
        for task in (feeding, answering):
            task.cancel()
        call.cancel()
        await asyncio.gather(feeding, answering, return_exceptions=True)
