"""The methods on open files. Each is one call of the API, OpenFile, that lasts as long as the file is open."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from agent.common.api_client import opened
from agent.gateway.errors import Failure, from_errno
from agent.gateway.jsonrpc import schema
from agent.gateway.jsonrpc.connection import Connection, method
from agent.gateway.jsonrpc.session import USER
from agent.gateway.methods.files import file_info, times
from sandboxd.v1 import file_pb2 as pb

_MAX_HANDLES = 1024
_MAX_IO_BYTES = 1 << 20
_FILE_MODE = 0o666
_ids = itertools.count(1)


class OpenFile:
    """One open file. Operations are carried out in the order in which they are asked for."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._turn = asyncio.Lock()

    async def ask(self, **request: Any) -> pb.OpenFileResponse:
        """Carries out one operation. :raises Failure: it failed. :raises grpc.aio.AioRpcError: the file is lost."""
        async with self._turn:
            await self._call.write(pb.OpenFileRequest(**request))
            response: Any = await self._call.read()
        if not isinstance(response, pb.OpenFileResponse):
            await self._call.code()
            raise Failure("BadResource", "the file was closed by the sandbox", code="EBADF")
        if response.HasField("error"):
            raise from_errno(response.error.reason, response.error.message)
        return response

    def close(self) -> None:
        """Closes the file. Idempotent."""
        self._call.cancel()


async def open_file(connection: Connection, path: str, **how: Any) -> int:
    """Opens a file and returns its handle. :raises Failure: :raises grpc.aio.AioRpcError:"""
    if len(connection.handles) >= _MAX_HANDLES:
        raise Failure("Error", f"{_MAX_HANDLES} files are open on this connection; close some", code="EMFILE")
    attachment = connection.attachment
    call = opened(attachment.api.files.OpenFile)
    handle = OpenFile(call)
    try:
        await handle.ask(open=pb.OpenFileRequest.Open(sandbox_id=attachment.id, path=path, user=USER, **how))
    except BaseException:
        handle.close()
        raise
    number = next(_ids)
    connection.handles[number] = handle
    return number


def _handle(connection: Connection, params: schema.Handle) -> OpenFile:
    handle = connection.handles.get(params.file_handle_id)
    if handle is None:
        raise Failure("BadResource", f"no file is open as {params.file_handle_id}", code="EBADF")
    return handle


@method("open", schema.Open)
async def open_path(connection: Connection, params: schema.Open) -> object:
    """Opens a file, to read unless the options say otherwise."""
    options = params.options or schema.OpenOptions()
    write, append = bool(options.write), bool(options.append)
    mode = _FILE_MODE if options.mode is None else options.mode & 0o7777
    number = await open_file(
        connection, params.path, read=bool(options.read) or not (write or append), write=write, append=append,
        truncate=bool(options.truncate), create=bool(options.create), create_new=bool(options.create_new),
        mode=mode & ~connection.attachment.umask,
    )  # fmt: skip
    return {"fileHandleId": number}


@method("create", schema.Path)
async def create(connection: Connection, params: schema.Path) -> object:
    """Makes or empties a file, and opens it to read and write."""
    number = await open_file(
        connection, params.path, read=True, write=True, truncate=True, create=True,
        mode=_FILE_MODE & ~connection.attachment.umask,
    )  # fmt: skip
    return {"fileHandleId": number}


@method("fileRead", schema.HandleRead)
async def read(connection: Connection, params: schema.HandleRead) -> object:
    """Reads at most so many bytes; null at the end."""
    # No more than what both SDKs take as one message.
    length = min(params.length, _MAX_IO_BYTES // 2)
    if not length:
        return {"data": b""}
    data = (await _handle(connection, params).ask(read=pb.OpenFileRequest.Read(length=length))).data
    return {"data": data or None}


@method("fileWrite", schema.HandleWrite)
async def write(connection: Connection, params: schema.HandleWrite) -> object:
    """Writes bytes; perhaps not all of them."""
    answer = await _handle(connection, params).ask(write=params.data[:_MAX_IO_BYTES])
    return {"bytesWritten": answer.written_bytes}


@method("fileSeek", schema.HandleSeek)
async def seek(connection: Connection, params: schema.HandleSeek) -> object:
    """Moves the position and returns it."""
    offset = int(params.offset)
    if not -(1 << 63) <= offset < 1 << 63:
        raise Failure("RangeError", f"offset {offset} is out of range")
    whence = pb.OpenFileRequest.Seek.Whence.ValueType(params.whence)
    answer = await _handle(connection, params).ask(seek=pb.OpenFileRequest.Seek(offset=offset, whence=whence))
    return {"position": answer.position}


@method("fileStat", schema.Handle)
async def stat(connection: Connection, params: schema.Handle) -> object:
    """Facts of the open file."""
    return file_info((await _handle(connection, params).ask(stat=pb.OpenFileRequest.Stat())).info)


@method("fileTruncate", schema.HandleTruncate)
async def truncate(connection: Connection, params: schema.HandleTruncate) -> object:
    """Sets the size."""
    size = params.size if params.len is None else params.len
    await _handle(connection, params).ask(truncate=pb.OpenFileRequest.Truncate(size_bytes=size or 0))
    return None


@method("fileSync", schema.Handle)
async def sync(connection: Connection, params: schema.Handle) -> object:
    """Has all written to the disk."""
    await _handle(connection, params).ask(sync=pb.OpenFileRequest.Sync())
    return None


@method("fileSyncData", schema.Handle)
async def sync_data(connection: Connection, params: schema.Handle) -> object:
    """Has the data written to the disk."""
    await _handle(connection, params).ask(sync=pb.OpenFileRequest.Sync(data_only=True))
    return None


@method("fileLock", schema.HandleLock)
async def lock(connection: Connection, params: schema.HandleLock) -> object:
    """Waits for the lock."""
    exclusive = bool(params.exclusive)
    await _handle(connection, params).ask(lock=pb.OpenFileRequest.Lock(exclusive=exclusive))
    return None


@method("fileUnlock", schema.Handle)
async def unlock(connection: Connection, params: schema.Handle) -> object:
    """Gives the lock back."""
    await _handle(connection, params).ask(unlock=pb.OpenFileRequest.Unlock())
    return None


@method("fileUtime", schema.HandleUtime)
async def utime(connection: Connection, params: schema.HandleUtime) -> object:
    """Sets access and modification time."""
    change = pb.OpenFileRequest.SetTimes(**times(params.atime, params.mtime))
    await _handle(connection, params).ask(set_times=change)
    return None


@method("fileClose", schema.Handle)
async def close(connection: Connection, params: schema.Handle) -> object:
    """Closes the file; what is under way on it fails."""
    _handle(connection, params).close()
    del connection.handles[params.file_handle_id]
    return None
