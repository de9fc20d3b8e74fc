"""Methods on open files. A file belongs to the connection that opened it, and is closed with it."""

from __future__ import annotations

import itertools
from typing import Any

from agent.gateway.errors import CallError
from agent.gateway.jsonrpc.connection import RpcConnection
from agent.gateway.methods.file_info import file_info, times
from agent.gateway.methods.files import apply_umask, file_fields
from agent.gateway.methods.params import open_file_params, path_params
from agent.gateway.nodes.guest_file import GuestFile
from sandboxd.v1 import file_pb2 as pb

_MAX_OPEN_FILES = 1024
_MAX_WRITE_BYTES = 1 << 20
_MAX_READ_BYTES = 1 << 19  # fits into a message of both SDKs as base64
_FILE_MODE = 0o666
_handle_ids = itertools.count(1)


async def _open(connection: RpcConnection, path: str, **options: Any) -> dict[str, object]:
    """Open a file and return the result with its handle id. :param options: fields of OpenFileRequest.Open."""
    if len(connection.open_files) >= _MAX_OPEN_FILES:
        raise CallError("Error", f"{_MAX_OPEN_FILES} files are open on this connection; close some", code="EMFILE")
    request = pb.OpenFileRequest.Open(**file_fields(connection), path=path, **options)
    file = await GuestFile.open(connection.session.api, request)
    handle_id = next(_handle_ids)
    connection.open_files[handle_id] = file
    return {"fileHandleId": handle_id}


def _open_file(connection: RpcConnection, params: open_file_params.Handle) -> GuestFile:
    file = connection.open_files.get(params.file_handle_id)
    if file is None:
        raise CallError("BadResource", f"no open file has the handle id {params.file_handle_id}", code="EBADF")
    return file


async def open_path(connection: RpcConnection, params: open_file_params.Open) -> object:
    """Open a file, for reading unless the options set write or append."""
    options = params.options or open_file_params.OpenOptions()
    write, append = bool(options.write), bool(options.append)
    return await _open(
        connection, params.path, read=bool(options.read) or not (write or append), write=write, append=append,
        truncate=bool(options.truncate), create=bool(options.create), create_new=bool(options.create_new),
        mode=apply_umask(connection, options.mode, _FILE_MODE),
    )  # fmt: skip


async def create(connection: RpcConnection, params: path_params.PathOnly) -> object:
    """Create or truncate a file, and open it for reading and writing."""
    return await _open(
        connection, params.path, read=True, write=True, truncate=True, create=True,
        mode=apply_umask(connection, None, _FILE_MODE),
    )  # fmt: skip


async def read(connection: RpcConnection, params: open_file_params.HandleRead) -> object:
    """Read at most `length` bytes; null at the end of the file."""
    length = min(params.length, _MAX_READ_BYTES)
    if not length:
        return {"data": b""}
    data = (await _open_file(connection, params).request(read=pb.OpenFileRequest.Read(length=length))).data
    return {"data": data or None}


async def write(connection: RpcConnection, params: open_file_params.HandleWrite) -> object:
    """Write bytes; the result may be fewer than given."""
    answer = await _open_file(connection, params).request(write=params.data[:_MAX_WRITE_BYTES])
    return {"bytesWritten": answer.written_bytes}


async def seek(connection: RpcConnection, params: open_file_params.HandleSeek) -> object:
    """Set the position and return it."""
    offset = int(params.offset)
    if not -(1 << 63) <= offset < 1 << 63:
        raise CallError("RangeError", f"offset {offset} is out of range")
    whence = pb.OpenFileRequest.Seek.Whence.ValueType(params.whence)
    answer = await _open_file(connection, params).request(seek=pb.OpenFileRequest.Seek(offset=offset, whence=whence))
    return {"position": answer.position}


async def stat(connection: RpcConnection, params: open_file_params.Handle) -> object:
    """Return metadata of an open file."""
    return file_info((await _open_file(connection, params).request(stat=pb.OpenFileRequest.Stat())).info)


async def truncate(connection: RpcConnection, params: open_file_params.HandleTruncate) -> object:
    """Set an open file's size."""
    size = params.size if params.len is None else params.len
    await _open_file(connection, params).request(truncate=pb.OpenFileRequest.Truncate(size_bytes=size or 0))
    return None


async def sync(connection: RpcConnection, params: open_file_params.Handle) -> object:
    """Flush data and metadata to disk."""
    await _open_file(connection, params).request(sync=pb.OpenFileRequest.Sync())
    return None


async def sync_data(connection: RpcConnection, params: open_file_params.Handle) -> object:
    """Flush data to disk."""
    await _open_file(connection, params).request(sync=pb.OpenFileRequest.Sync(data_only=True))
    return None


async def lock(connection: RpcConnection, params: open_file_params.HandleLock) -> object:
    """Wait for the advisory lock of an open file."""
    exclusive = bool(params.exclusive)
    await _open_file(connection, params).request(lock=pb.OpenFileRequest.Lock(exclusive=exclusive))
    return None


async def unlock(connection: RpcConnection, params: open_file_params.Handle) -> object:
    """Release the advisory lock."""
    await _open_file(connection, params).request(unlock=pb.OpenFileRequest.Unlock())
    return None


async def utime(connection: RpcConnection, params: open_file_params.HandleUtime) -> object:
    """Set access and modification time."""
    change = pb.OpenFileRequest.SetTimes(**times(params.atime, params.mtime))
    await _open_file(connection, params).request(set_times=change)
    return None


async def close(connection: RpcConnection, params: open_file_params.Handle) -> object:
    """Close a file; its running operations fail."""
    _open_file(connection, params).close()
    del connection.open_files[params.file_handle_id]
    return None
