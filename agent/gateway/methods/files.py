"""Methods on paths, as the sandbox's default user. Each has the semantics of the Deno function with its name."""

from __future__ import annotations

import posixpath
from collections.abc import AsyncIterator
from typing import Any

from agent.common.model import DEFAULT_USER
from agent.gateway.errors import CallError
from agent.gateway.jsonrpc.connection import RpcConnection
from agent.gateway.methods.file_info import entry_kind, file_info, times
from agent.gateway.methods.params import path_params
from sandboxd.v1 import file_pb2 as pb

_DIRECTORY_MODE = 0o777


def file_fields(connection: RpcConnection) -> dict[str, Any]:
    """Return the fields that all file requests of the API have in common."""
    return {"sandbox_id": connection.session.sandbox_id, "user": DEFAULT_USER}


def apply_umask(connection: RpcConnection, mode: int | None, default: int) -> int:
    """Return the permission bits of a new file: `mode`, or `default` if it is None, without the bits of the umask."""
    return (default if mode is None else mode & 0o7777) & ~connection.session.umask


# -- queries -----------------------------------------------------------------------------------------------------------


async def stat_file(connection: RpcConnection, params: path_params.PathOnly) -> object:
    """Return metadata of a file; symbolic links are followed."""
    return file_info(
        await connection.session.api.files.Stat(pb.StatRequest(**file_fields(connection), path=params.path))
    )


async def lstat_file(connection: RpcConnection, params: path_params.PathOnly) -> object:
    """Return metadata of a file; a symbolic link is not followed."""
    request = pb.StatRequest(**file_fields(connection), path=params.path, no_follow=True)
    return file_info(await connection.session.api.files.Stat(request))


async def read_dir(connection: RpcConnection, params: path_params.PathOnly) -> object:
    """Return the entries of a directory, unordered."""
    return [
        {"name": posixpath.basename(info.path), **entry_kind(info)}
        async for info in list_directory(connection, params.path)
    ]


async def list_directory(connection: RpcConnection, path: str) -> AsyncIterator[pb.FileInfo]:
    """Yield the entries of a directory, unordered.

    :raises grpc.aio.AioRpcError: it is not a readable directory.
    """
    request = pb.ListDirectoryRequest(**file_fields(connection), path=path)
    async for page in connection.session.api.files.ListDirectory(request):
        for info in page.entries:
            yield info


async def lstat(connection: RpcConnection, path: str) -> pb.FileInfo:
    """Return metadata of a file without following a symbolic link.

    :raises grpc.aio.AioRpcError: it does not exist.
    """
    return await connection.session.api.files.Stat(pb.StatRequest(**file_fields(connection), path=path, no_follow=True))


async def real_path(connection: RpcConnection, path: str) -> str:
    """Return a path with all symbolic links resolved.

    :raises grpc.aio.AioRpcError: it does not exist.
    """
    return (await connection.session.api.files.RealPath(pb.RealPathRequest(**file_fields(connection), path=path))).path


async def read_link(connection: RpcConnection, params: path_params.PathOnly) -> object:
    """Return the target of a symbolic link."""
    request = pb.ReadLinkRequest(**file_fields(connection), path=params.path)
    return (await connection.session.api.files.ReadLink(request)).target


async def real_path_of(connection: RpcConnection, params: path_params.PathOnly) -> object:
    """Return a path with all symbolic links resolved."""
    return await real_path(connection, params.path)


# -- changes -----------------------------------------------------------------------------------------------------------


async def remove(connection: RpcConnection, params: path_params.Remove) -> object:
    """Remove a file or directory."""
    recursive = bool(params.options and params.options.recursive)
    await connection.session.api.files.Remove(
        pb.RemoveRequest(**file_fields(connection), path=params.path, recursive=recursive)
    )
    return None


async def mkdir(connection: RpcConnection, params: path_params.Mkdir) -> object:
    """Create a directory."""
    options = params.options or path_params.MkdirOptions()
    mode = apply_umask(connection, options.mode, _DIRECTORY_MODE)
    request = pb.MakeDirectoryRequest(
        **file_fields(connection), path=params.path, parents=bool(options.recursive), mode=mode
    )
    await connection.session.api.files.MakeDirectory(request)
    return None


async def rename(connection: RpcConnection, params: path_params.Rename) -> object:
    """Rename a file or directory."""
    request = pb.RenameRequest(**file_fields(connection), path=params.old_path, new_path=params.new_path)
    await connection.session.api.files.Rename(request)
    return None


async def chmod(connection: RpcConnection, params: path_params.Chmod) -> object:
    """Set permission bits."""
    request = pb.ChmodRequest(**file_fields(connection), path=params.path, mode=params.mode & 0o7777)
    await connection.session.api.files.Chmod(request)
    return None


async def chown(connection: RpcConnection, params: path_params.Chown) -> object:
    """Set owner and group."""
    request = pb.ChownRequest(**file_fields(connection), path=params.path)
    for name in ("uid", "gid"):
        value = getattr(params, name)
        if value is not None:
            if value >= 1 << 31:
                raise CallError("PermissionDenied", f"{name} {value} is out of range", code="EPERM")
            setattr(request, name, value)
    await connection.session.api.files.Chown(request)
    return None


async def copy_file(connection: RpcConnection, params: path_params.CopyFile) -> object:
    """Copy contents and permission bits."""
    request = pb.CopyRequest(**file_fields(connection), path=params.from_path, new_path=params.to_path)
    await connection.session.api.files.Copy(request)
    return None


async def link(connection: RpcConnection, params: path_params.MakeLink) -> object:
    """Create a hard link."""
    request = pb.LinkRequest(**file_fields(connection), path=params.target, new_path=params.path)
    await connection.session.api.files.Link(request)
    return None


async def symlink(connection: RpcConnection, params: path_params.MakeLink) -> object:
    """Create a symbolic link."""
    request = pb.SymlinkRequest(**file_fields(connection), target=params.target, new_path=params.path)
    await connection.session.api.files.Symlink(request)
    return None


async def make_temp(connection: RpcConnection, options: path_params.TempOptions | None, *, directory: bool) -> str:
    """Create a temporary file or directory and return its path.

    :raises grpc.aio.AioRpcError: it cannot be created.
    """
    options = options or path_params.TempOptions()
    request = pb.MakeTempRequest(
        **file_fields(connection), directory=options.dir or "", prefix=options.prefix or "",
        suffix=options.suffix or "", make_directory=directory,
    )  # fmt: skip
    return (await connection.session.api.files.MakeTemp(request)).path


async def make_temp_dir(connection: RpcConnection, params: path_params.Temp) -> object:
    """Create a temporary directory."""
    return await make_temp(connection, params.options, directory=True)


async def make_temp_file(connection: RpcConnection, params: path_params.Temp) -> object:
    """Create a temporary file."""
    return await make_temp(connection, params.options, directory=False)


async def truncate(connection: RpcConnection, params: path_params.Truncate) -> object:
    """Set a file's size."""
    request = pb.TruncateRequest(**file_fields(connection), path=params.name, size_bytes=params.length or 0)
    await connection.session.api.files.Truncate(request)
    return None


async def umask(connection: RpcConnection, params: path_params.Umask) -> object:
    """Set the session's umask, if one is given; return the previous one."""
    before = connection.session.umask
    if params.mask is not None:
        connection.session.umask = params.mask
    return before


async def utime(connection: RpcConnection, params: path_params.Utime) -> object:
    """Set access and modification time."""
    request = pb.SetTimesRequest(**file_fields(connection), path=params.path, **times(params.atime, params.mtime))
    await connection.session.api.files.SetTimes(request)
    return None
