"""The methods on files, as the sandbox's user. Semantics are those of Deno's functions of the same names."""

from __future__ import annotations

import posixpath
import stat
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from agent.gateway.errors import Failure
from agent.gateway.jsonrpc import schema
from agent.gateway.jsonrpc.connection import Connection, method
from agent.gateway.jsonrpc.session import USER
from sandboxd.v1 import file_pb2 as pb

_Type = pb.FileInfo.Type
_FORMAT = {
    _Type.TYPE_FILE: stat.S_IFREG, _Type.TYPE_DIRECTORY: stat.S_IFDIR, _Type.TYPE_SYMLINK: stat.S_IFLNK,
    _Type.TYPE_BLOCK_DEVICE: stat.S_IFBLK, _Type.TYPE_CHARACTER_DEVICE: stat.S_IFCHR, _Type.TYPE_FIFO: stat.S_IFIFO,
    _Type.TYPE_SOCKET: stat.S_IFSOCK,
}  # fmt: skip
_FIRST_S, _LAST_S = -62_135_596_800, 253_402_300_799  # years 1 to 9999: what a date can say
_DIRECTORY_MODE = 0o777


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


def within(connection: Connection) -> dict[str, Any]:
    """Returns the fields that every request about a file has."""
    return {"sandbox_id": connection.attachment.id, "user": USER}


def masked(connection: Connection, mode: int | None, default: int) -> int:
    """Returns the permission bits of a new file: what was asked for, without what the mask takes away."""
    return (default if mode is None else mode & 0o7777) & ~connection.attachment.umask


# -- facts -------------------------------------------------------------------------------------------------------------


@method("stat", schema.Path)
async def stat_file(connection: Connection, params: schema.Path) -> object:
    """Facts of what a path leads to."""
    return file_info(await connection.attachment.api.files.Stat(pb.StatRequest(**within(connection), path=params.path)))


@method("lstat", schema.Path)
async def lstat_file(connection: Connection, params: schema.Path) -> object:
    """Facts of what is at a path."""
    request = pb.StatRequest(**within(connection), path=params.path, no_follow=True)
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
    request = pb.ListDirectoryRequest(**within(connection), path=path)
    async for page in connection.attachment.api.files.ListDirectory(request):
        for info in page.entries:
            yield info


async def lstat(connection: Connection, path: str) -> pb.FileInfo:
    """Returns facts of what is at a path. :raises grpc.aio.AioRpcError:"""
    return await connection.attachment.api.files.Stat(pb.StatRequest(**within(connection), path=path, no_follow=True))


async def real_path(connection: Connection, path: str) -> str:
    """Returns a path with all links resolved. :raises grpc.aio.AioRpcError:"""
    return (await connection.attachment.api.files.RealPath(pb.RealPathRequest(**within(connection), path=path))).path


@method("readLink", schema.Path)
async def read_link(connection: Connection, params: schema.Path) -> object:
    """What a symbolic link says."""
    request = pb.ReadLinkRequest(**within(connection), path=params.path)
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
        pb.RemoveRequest(**within(connection), path=params.path, recursive=recursive)
    )
    return None


@method("mkdir", schema.Mkdir)
async def mkdir(connection: Connection, params: schema.Mkdir) -> object:
    """Makes a directory."""
    options = params.options or schema.MkdirOptions()
    mode = masked(connection, options.mode, _DIRECTORY_MODE)
    request = pb.MakeDirectoryRequest(
        **within(connection), path=params.path, parents=bool(options.recursive), mode=mode
    )
    await connection.attachment.api.files.MakeDirectory(request)
    return None


@method("rename", schema.Rename)
async def rename(connection: Connection, params: schema.Rename) -> object:
    """Renames a file or directory."""
    request = pb.RenameRequest(**within(connection), path=params.old_path, new_path=params.new_path)
    await connection.attachment.api.files.Rename(request)
    return None


@method("chmod", schema.Chmod)
async def chmod(connection: Connection, params: schema.Chmod) -> object:
    """Sets permission bits."""
    request = pb.ChmodRequest(**within(connection), path=params.path, mode=params.mode & 0o7777)
    await connection.attachment.api.files.Chmod(request)
    return None


@method("chown", schema.Chown)
async def chown(connection: Connection, params: schema.Chown) -> object:
    """Sets owner and group."""
    request = pb.ChownRequest(**within(connection), path=params.path)
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
    request = pb.CopyRequest(**within(connection), path=params.from_path, new_path=params.to_path)
    await connection.attachment.api.files.Copy(request)
    return None


@method("link", schema.Link)
async def link(connection: Connection, params: schema.Link) -> object:
    """Makes a hard link."""
    request = pb.LinkRequest(**within(connection), path=params.target, new_path=params.path)
    await connection.attachment.api.files.Link(request)
    return None


@method("symlink", schema.Link)
async def symlink(connection: Connection, params: schema.Link) -> object:
    """Makes a symbolic link."""
    request = pb.SymlinkRequest(**within(connection), target=params.target, new_path=params.path)
    await connection.attachment.api.files.Symlink(request)
    return None


async def make_temp(connection: Connection, options: schema.TempOptions | None, *, directory: bool) -> str:
    """Makes a temporary file or directory and returns its path. :raises grpc.aio.AioRpcError:"""
    options = options or schema.TempOptions()
    request = pb.MakeTempRequest(
        **within(connection), directory=options.dir or "", prefix=options.prefix or "", suffix=options.suffix or "",
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
    request = pb.TruncateRequest(**within(connection), path=params.name, size_bytes=params.length or 0)
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
    request = pb.SetTimesRequest(**within(connection), path=params.path, **times(params.atime, params.mtime))
    await connection.attachment.api.files.SetTimes(request)
    return None
