"""The methods on files, as the sandbox's user. Semantics are those of Deno's functions of the same names."""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
import stat
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from agent.client import is_cut_off, opened
from agent.gateway import schema
from agent.gateway.attachment import USER
from agent.gateway.connection import Connection, method
from agent.gateway.failures import Failure
from sandboxd.v1 import file_pb2 as pb

_Type = pb.FileInfo.Type
_FORMAT = {
    _Type.TYPE_FILE: stat.S_IFREG, _Type.TYPE_DIRECTORY: stat.S_IFDIR, _Type.TYPE_SYMLINK: stat.S_IFLNK,
    _Type.TYPE_BLOCK_DEVICE: stat.S_IFBLK, _Type.TYPE_CHARACTER_DEVICE: stat.S_IFCHR, _Type.TYPE_FIFO: stat.S_IFIFO,
    _Type.TYPE_SOCKET: stat.S_IFSOCK,
}  # fmt: skip
_FIRST_S, _LAST_S = -62_135_596_800, 253_402_300_799  # years 1 to 9999: what a date can say
_WRITE_BYTES = 256 << 10
_FILE_MODE, _DIRECTORY_MODE = 0o666, 0o777


def _iso(time: Timestamp) -> str:
    seconds = min(max(time.seconds, _FIRST_S), _LAST_S)
    moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=time.nanos // 1000 % 1_000_000)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def file_info(info: pb.FileInfo) -> dict[str, object]:
    """Returns the FileInfo of the SDKs."""
    kind = info.type
    return {
        **entry_kind(info), "size": info.size_bytes, "mtime": _iso(info.modify_time), "atime": _iso(info.access_time),
        "birthtime": _iso(info.change_time), "ctime": _iso(info.change_time), "dev": info.device, "ino": info.inode,
        "mode": _FORMAT.get(kind, 0) | info.mode, "nlink": info.link_count, "uid": info.uid & 0xFFFF_FFFF,
        "gid": info.gid & 0xFFFF_FFFF, "rdev": info.device_number, "blksize": info.block_size, "blocks": info.blocks,
        "isBlockDevice": kind == _Type.TYPE_BLOCK_DEVICE, "isCharDevice": kind == _Type.TYPE_CHARACTER_DEVICE,
        "isFifo": kind == _Type.TYPE_FIFO, "isSocket": kind == _Type.TYPE_SOCKET,
    }  # fmt: skip


def entry_kind(info: pb.FileInfo) -> dict[str, object]:
    """Returns the three kinds that an entry of a directory has."""
    return {
        "isFile": info.type == _Type.TYPE_FILE, "isDirectory": info.type == _Type.TYPE_DIRECTORY,
        "isSymlink": info.type == _Type.TYPE_SYMLINK,
    }  # fmt: skip


def times(atime: schema.Time, mtime: schema.Time) -> dict[str, Any]:
    """Returns the two fields of a request. :raises Failure: no time."""
    return {"access_time": _timestamp(atime), "modify_time": _timestamp(mtime)}


def _timestamp(value: schema.Time) -> Timestamp:
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            micros = round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1e6)
        else:
            micros = round(value * 1e6)
        result = Timestamp()
        result.FromMicroseconds(micros)
    except (ValueError, OverflowError):
        raise Failure("TypeError", f"{value!r:.80} is not a time: give a date, or seconds since 1970") from None
    return result


def _of(connection: Connection) -> dict[str, Any]:
    return {"sandbox_id": connection.attachment.id, "user": USER}


def _masked(connection: Connection, mode: int | None, default: int) -> int:
    return (default if mode is None else mode & 0o7777) & ~connection.attachment.umask


# -- contents ----------------------------------------------------------------------------------------------------------


async def _contents(connection: Connection, path: str) -> bytes:
    request = pb.ReadFileRequest(**_of(connection), path=path)
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
        **_of(connection), path=params.path, disposition=disposition, must_exist=must_exist,
        mode=_masked(connection, None, _FILE_MODE),
    )  # fmt: skip
    if content is not None:
        await write_stream(connection, begin, _pieces(content))
    elif params.content_stream_id is not None:
        async with connection.inbound(params.content_stream_id) as source:
            await write_stream(connection, begin, source_pieces(source))
    else:
        raise Failure("TypeError", "content or contentStreamId must be given")
    if options.mode is not None:
        request = pb.ChmodRequest(**_of(connection), path=params.path, mode=options.mode & 0o7777)
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


# -- facts -------------------------------------------------------------------------------------------------------------


@method("stat", schema.Path)
async def stat_file(connection: Connection, params: schema.Path) -> object:
    """Facts of what a path leads to."""
    return file_info(await connection.attachment.api.files.Stat(pb.StatRequest(**_of(connection), path=params.path)))


@method("lstat", schema.Path)
async def lstat_file(connection: Connection, params: schema.Path) -> object:
    """Facts of what is at a path."""
    request = pb.StatRequest(**_of(connection), path=params.path, no_follow=True)
    return file_info(await connection.attachment.api.files.Stat(request))


@method("readDir", schema.Path)
async def read_dir(connection: Connection, params: schema.Path) -> object:
    """The entries of a directory, in any order."""
    return [
        {"name": posixpath.basename(info.path), **entry_kind(info)}
        async for info in list_directory(connection, params.path)
    ]


async def list_directory(connection: Connection, path: str) -> AsyncIterator[pb.FileInfo]:
    """Yields the entries of a directory. :raises grpc.aio.AioRpcError:"""
    request = pb.ListDirectoryRequest(**_of(connection), path=path)
    async for page in connection.attachment.api.files.ListDirectory(request):
        for info in page.entries:
            yield info


async def lstat(connection: Connection, path: str) -> pb.FileInfo:
    """Returns facts of what is at a path. :raises grpc.aio.AioRpcError:"""
    return await connection.attachment.api.files.Stat(pb.StatRequest(**_of(connection), path=path, no_follow=True))


async def real_path(connection: Connection, path: str) -> str:
    """Returns a path with all links resolved. :raises grpc.aio.AioRpcError:"""
    return (await connection.attachment.api.files.RealPath(pb.RealPathRequest(**_of(connection), path=path))).path


@method("readLink", schema.Path)
async def read_link(connection: Connection, params: schema.Path) -> object:
    """What a symbolic link says."""
    request = pb.ReadLinkRequest(**_of(connection), path=params.path)
    return (await connection.attachment.api.files.ReadLink(request)).target


@method("realPath", schema.Path)
async def real_path_of(connection: Connection, params: schema.Path) -> object:
    """The path with all links resolved."""
    return await real_path(connection, params.path)


# -- changes -----------------------------------------------------------------------------------------------------------


@method("remove", schema.Remove)
async def remove(connection: Connection, params: schema.Remove) -> object:
    """Removes a file or directory."""
    recursive = bool(params.options and params.options.recursive)
    await connection.attachment.api.files.Remove(
        pb.RemoveRequest(**_of(connection), path=params.path, recursive=recursive)
    )
    return None


@method("mkdir", schema.Mkdir)
async def mkdir(connection: Connection, params: schema.Mkdir) -> object:
    """Makes a directory."""
    options = params.options or schema.MkdirOptions()
    mode = _masked(connection, options.mode, _DIRECTORY_MODE)
    request = pb.MakeDirectoryRequest(**_of(connection), path=params.path, parents=bool(options.recursive), mode=mode)
    await connection.attachment.api.files.MakeDirectory(request)
    return None


@method("rename", schema.Rename)
async def rename(connection: Connection, params: schema.Rename) -> object:
    """Renames a file or directory."""
    request = pb.RenameRequest(**_of(connection), path=params.old_path, new_path=params.new_path)
    await connection.attachment.api.files.Rename(request)
    return None


@method("chmod", schema.Chmod)
async def chmod(connection: Connection, params: schema.Chmod) -> object:
    """Sets permission bits."""
    request = pb.ChmodRequest(**_of(connection), path=params.path, mode=params.mode & 0o7777)
    await connection.attachment.api.files.Chmod(request)
    return None


@method("chown", schema.Chown)
async def chown(connection: Connection, params: schema.Chown) -> object:
    """Sets owner and group."""
    request = pb.ChownRequest(**_of(connection), path=params.path)
    for name in ("uid", "gid"):
        value = getattr(params, name)
        if value is not None:
            if value >= 1 << 31:
                raise Failure("PermissionDenied", f"{name} {value} is out of range", code="EPERM")
            setattr(request, name, value)
    await connection.attachment.api.files.Chown(request)
    return None


@method("copyFile", schema.CopyFile)
async def copy_file(connection: Connection, params: schema.CopyFile) -> object:
    """Copies contents and permissions."""
    request = pb.CopyRequest(**_of(connection), path=params.from_path, new_path=params.to_path)
    await connection.attachment.api.files.Copy(request)
    return None


@method("link", schema.Link)
async def link(connection: Connection, params: schema.Link) -> object:
    """Makes a hard link."""
    request = pb.LinkRequest(**_of(connection), path=params.target, new_path=params.path)
    await connection.attachment.api.files.Link(request)
    return None


@method("symlink", schema.Link)
async def symlink(connection: Connection, params: schema.Link) -> object:
    """Makes a symbolic link."""
    request = pb.SymlinkRequest(**_of(connection), target=params.target, new_path=params.path)
    await connection.attachment.api.files.Symlink(request)
    return None


async def make_temp(connection: Connection, options: schema.TempOptions | None, *, directory: bool) -> str:
    """Makes a temporary file or directory and returns its path. :raises grpc.aio.AioRpcError:"""
    options = options or schema.TempOptions()
    request = pb.MakeTempRequest(
        **_of(connection), directory=options.dir or "", prefix=options.prefix or "", suffix=options.suffix or "",
        make_directory=directory,
    )  # fmt: skip
    return (await connection.attachment.api.files.MakeTemp(request)).path


@method("makeTempDir", schema.Temp)
async def make_temp_dir(connection: Connection, params: schema.Temp) -> object:
    """Makes a temporary directory."""
    return await make_temp(connection, params.options, directory=True)


@method("makeTempFile", schema.Temp)
async def make_temp_file(connection: Connection, params: schema.Temp) -> object:
    """Makes a temporary file."""
    return await make_temp(connection, params.options, directory=False)


@method("truncate", schema.Truncate)
async def truncate(connection: Connection, params: schema.Truncate) -> object:
    """Sets a file's size."""
    request = pb.TruncateRequest(**_of(connection), path=params.name, size_bytes=params.length or 0)
    await connection.attachment.api.files.Truncate(request)
    return None


@method("umask", schema.Umask)
async def umask(connection: Connection, params: schema.Umask) -> object:
    """Sets the mask of new files' modes, if one is given; the one before."""
    before = connection.attachment.umask
    if params.mask is not None:
        connection.attachment.umask = params.mask
    return before


@method("utime", schema.Utime)
async def utime(connection: Connection, params: schema.Utime) -> object:
    """Sets access and modification time."""
    request = pb.SetTimesRequest(**_of(connection), path=params.path, **times(params.atime, params.mtime))
    await connection.attachment.api.files.SetTimes(request)
    return None
