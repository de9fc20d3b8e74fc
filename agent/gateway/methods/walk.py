"""Method walk, with the semantics of `walk` in @std/fs."""

from __future__ import annotations

import math
import posixpath
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import grpc
import msgspec

from agent.gateway.errors import CallError, call_error_from_rpc
from agent.gateway.jsonrpc.connection import RpcConnection
from agent.gateway.methods import patterns
from agent.gateway.methods.file_info import entry_kind
from agent.gateway.methods.files import list_directory, lstat, real_path
from agent.gateway.methods.params import path_params
from agent.gateway.methods.patterns import Matcher
from sandboxd.v1 import file_pb2 as pb

_MAX_DEPTH = 256  # bounds the recursion against hostile trees
_encode = msgspec.json.Encoder().encode

Entry = dict[str, object]  # a WalkEntry of @std/fs: path, name, and the three type flags


@dataclass(frozen=True)
class WalkFilter:
    """Options of a walk: which entries it yields, and which directories it enters."""

    max_depth: float = math.inf
    files: bool = True
    directories: bool = True
    links: bool = True
    follow: bool = False
    canonical: bool = True
    exts: tuple[str, ...] | None = None
    match: tuple[Matcher, ...] | None = None
    skip: tuple[Matcher, ...] = ()

    def enters(self, path: str) -> bool:
        """Return whether the walk enters a directory."""
        return not any(matches(path) for matches in self.skip)

    def accepts(self, path: str) -> bool:
        """Return whether an entry passes `exts`, `match` and `skip`."""
        if self.exts is not None and not any(path.endswith(ext) for ext in self.exts):
            return False
        if self.match is not None and not any(matches(path) for matches in self.match):
            return False
        return self.enters(path)


def make_entry(path: str, info: pb.FileInfo) -> Entry:
    """Return an entry of a walk in the SDKs' form."""
    path = posixpath.normpath(path)
    return {"path": path, "name": posixpath.basename(path) or path, **entry_kind(info)}


async def walk_tree(connection: RpcConnection, root: str, options: WalkFilter, depth: int = 0) -> AsyncIterator[Entry]:
    """Yield the root and the entries below it, parents first.

    :raises grpc.aio.AioRpcError: a directory cannot be read.
    :raises CallError: the tree is too deep.
    """
    if options.max_depth < 0:
        return
    if options.directories and options.accepts(root):
        yield make_entry(root, await lstat(connection, root))
    if options.max_depth < 1 or not options.enters(root):
        return
    if depth >= _MAX_DEPTH:
        raise CallError("FilesystemLoop", f"{root} is nested more than {_MAX_DEPTH} directories deep", code="ELOOP")
    below = replace(options, max_depth=options.max_depth - 1)
    async for info in list_directory(connection, root):
        path = posixpath.normpath(posixpath.join(root, posixpath.basename(info.path)))
        if info.type == pb.FileInfo.TYPE_SYMLINK:
            if not options.follow:
                if options.links and options.accepts(path):
                    yield make_entry(path, info)
                continue
            target = await real_path(connection, path)
            info = await lstat(connection, target)  # noqa: PLW2901  the target replaces the link
            path = target if options.canonical else path
        if info.type == pb.FileInfo.TYPE_DIRECTORY:
            async for entry in walk_tree(connection, path, below, depth + 1):
                yield entry
        elif options.files and options.accepts(path):
            yield make_entry(path, info)


def value_or(value: bool | None, default: bool) -> bool:
    """Return an optional flag, or its default."""
    return default if value is None else value


def _matchers(values: list[path_params.Pattern] | None) -> tuple[Matcher, ...] | None:
    return None if values is None else tuple(patterns.from_javascript(value.source, value.flags) for value in values)


def _filter(options: path_params.WalkOptions) -> WalkFilter:
    exts = None
    if options.exts is not None:
        exts = tuple(ext if ext.startswith(".") else f".{ext}" for ext in options.exts)
    return WalkFilter(
        max_depth=math.inf if options.max_depth is None else options.max_depth,
        files=value_or(options.include_files, True), directories=value_or(options.include_dirs, True),
        links=value_or(options.include_symlinks, True), follow=value_or(options.follow_symlinks, False),
        canonical=value_or(options.canonicalize, True), exts=exts, match=_matchers(options.match),
        skip=_matchers(options.skip) or (),
    )  # fmt: skip


async def walk(connection: RpcConnection, params: path_params.Walk) -> object:
    """Return the entries of a tree."""
    options = _filter(params.options or params)
    await lstat(connection, params.path)  # a missing root fails the call instead of the stream
    return await deliver_entries(connection, walk_tree(connection, params.path, options))


async def deliver_entries(connection: RpcConnection, entries: AsyncIterator[Entry]) -> object:
    """Return the result of a walk: for JavaScript a stream of JSON documents, for Python a list."""
    if connection.is_python:
        return [entry async for entry in entries]
    stream = connection.streams.outbound()

    async def send() -> None:
        try:
            async for entry in entries:
                if not stream.open:
                    break
                await stream.write_chunk(_encode(entry))
            await stream.end()
        except grpc.aio.AioRpcError as error:
            await stream.fail(call_error_from_rpc(error))
        except CallError as error:
            await stream.fail(error)
        finally:
            connection.streams.remove(stream)

    connection.spawn(send())
    return {"streamId": stream.id}
