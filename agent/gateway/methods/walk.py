"""The methods walk and expandGlob, with the semantics of @std/fs: entries as the SDKs want them, one after another."""

from __future__ import annotations

import math
import posixpath
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import grpc
import msgspec

from agent.gateway.errors import Failure, from_rpc
from agent.gateway.jsonrpc import schema
from agent.gateway.jsonrpc.connection import Connection, method
from agent.gateway.methods import patterns
from agent.gateway.methods.files import entry_kind, list_directory, lstat, real_path
from agent.gateway.methods.patterns import Matcher
from sandboxd.v1 import file_pb2 as pb

_MAX_DEPTH = 256  # deeper trees exist only to exhaust whoever walks them
_GLOB_LETTERS = frozenset("*?[{")
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Wish:
    """Which entries of a tree are wanted, and where the walk goes."""

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
        """Whether nothing below a path is left out."""
        return not any(matches(path) for matches in self.skip)

    def takes(self, path: str) -> bool:
        """Whether an entry is among the wanted, whatever its kind."""
        if self.exts is not None and not any(path.endswith(ext) for ext in self.exts):
            return False
        if self.match is not None and not any(matches(path) for matches in self.match):
            return False
        return self.enters(path)


def _entry(path: str, info: pb.FileInfo) -> dict[str, object]:
    path = posixpath.normpath(path)
    return {"path": path, "name": posixpath.basename(path) or path, **entry_kind(info)}


async def walk(connection: Connection, root: str, wish: Wish, depth: int = 0) -> AsyncIterator[dict[str, object]]:
    """Yields the root, then what is below it, parents first. :raises grpc.aio.AioRpcError:"""
    if wish.max_depth < 0:
        return
    if wish.directories and wish.takes(root):
        yield _entry(root, await lstat(connection, root))
    if wish.max_depth < 1 or not wish.enters(root):
        return
    if depth >= _MAX_DEPTH:
        raise Failure("FilesystemLoop", f"{root} is nested more than {_MAX_DEPTH} directories deep", code="ELOOP")
    below = replace(wish, max_depth=wish.max_depth - 1)
    async for info in list_directory(connection, root):
        path = posixpath.normpath(posixpath.join(root, posixpath.basename(info.path)))
        if info.type == pb.FileInfo.TYPE_SYMLINK:
            if not wish.follow:
                if wish.links and wish.takes(path):
                    yield _entry(path, info)
                continue
            target = await real_path(connection, path)
            info = await lstat(connection, target)  # noqa: PLW2901  the link's target stands for it
            path = target if wish.canonical else path
        if info.type == pb.FileInfo.TYPE_DIRECTORY:
            async for entry in walk(connection, path, below, depth + 1):
                yield entry
        elif wish.files and wish.takes(path):
            yield _entry(path, info)


def _is_true(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _patterns(values: list[schema.Pattern] | None) -> tuple[Matcher, ...] | None:
    return None if values is None else tuple(patterns.from_javascript(value.source, value.flags) for value in values)


def _wish(options: schema.WalkOptions) -> Wish:
    exts = None
    if options.exts is not None:
        exts = tuple(ext if ext.startswith(".") else f".{ext}" for ext in options.exts)
    return Wish(
        max_depth=math.inf if options.max_depth is None else options.max_depth,
        files=_is_true(options.include_files, True), directories=_is_true(options.include_dirs, True),
        links=_is_true(options.include_symlinks, True), follow=_is_true(options.follow_symlinks, False),
        canonical=_is_true(options.canonicalize, True), exts=exts, match=_patterns(options.match),
        skip=_patterns(options.skip) or (),
    )  # fmt: skip


@method("walk", schema.Walk)
async def walk_method(connection: Connection, params: schema.Walk) -> object:
    """Entries of a tree."""
    wish = _wish(params.options or params)
    await lstat(connection, params.path)  # a missing root fails the call, not the stream
    return await _deliver(connection, walk(connection, params.path, wish))


async def _deliver(connection: Connection, entries: AsyncIterator[dict[str, object]]) -> object:
    """Returns the entries as each SDK has it: a stream of documents, or for Python the list of its README."""
    if connection.is_python:
        return [entry async for entry in entries]
    stream = connection.outbound()

    async def pump() -> None:
        try:
            async for entry in entries:
                if not stream.open:
                    break
                await stream.write_whole(_encode(entry))
            await stream.end()
        except grpc.aio.AioRpcError as error:
            await stream.fail(from_rpc(error))
        except Failure as failure:
            await stream.fail(failure)
        finally:
            connection.forget(stream)

    connection.spawn(pump())
    return {"streamId": stream.id}


# -- globs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _GlobSearch:
    connection: Connection
    wish: Wish
    globstar: bool
    compile: Callable[[str], Matcher]

    async def advance(self, paths: list[dict[str, Any]], segment: str) -> AsyncIterator[dict[str, Any]]:
        """Yields what a segment of the pattern leads to from each of the paths."""
        for entry in paths:
            if not entry["isDirectory"]:
                continue
            at = entry["path"]
            if self.globstar and segment == "**":
                async for found in walk(self.connection, at, replace(self.wish, links=False)):
                    yield found
            else:
                matcher = self.compile(segment)
                async for found in walk(self.connection, at, replace(self.wish, max_depth=1)):
                    if found["path"] != at and matcher(posixpath.basename(str(found["path"]))):
                        yield found


async def _expand(connection: Connection, params: schema.Glob, options: schema.GlobOptions) -> Any:
    root = await real_path(connection, options.root or ".")
    flags = {
        "extended": _is_true(options.extended, True), "globstar": _is_true(options.globstar, True),
        "case_insensitive": _is_true(options.case_insensitive, False),
    }  # fmt: skip
    excluded = []
    for text in options.exclude or []:
        absolute = posixpath.normpath(posixpath.join(root, text))
        excluded += [patterns.from_glob(absolute, **flags), patterns.from_glob(f"{absolute}/**", **flags)]
    wish = Wish(
        follow=_is_true(options.follow_symlinks, False), canonical=_is_true(options.canonicalize, True),
        skip=tuple(excluded),
    )  # fmt: skip
    search = _GlobSearch(connection, wish, flags["globstar"], lambda segment: patterns.from_glob(segment, **flags))
    only_directories = params.glob.endswith("/")
    segments = [segment for segment in params.glob.split("/") if segment not in ("", ".")]
    start = "/" if params.glob.startswith("/") else root
    while segments and not _GLOB_LETTERS & set(segments[0]) and "(" not in segments[0]:
        start = posixpath.normpath(posixpath.join(start, segments.pop(0)))
    try:
        found = [_entry(start, await lstat(connection, start))]
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return
        raise
    if not wish.enters(start):
        return
    for segment in segments:
        if segment == "..":
            found = [
                _entry(parent, await lstat(connection, parent))
                for parent in dict.fromkeys(posixpath.dirname(str(entry["path"])) for entry in found)
            ]
        else:
            by_path = {str(entry["path"]): entry async for entry in search.advance(found, segment)}
            found = list(by_path.values())
    include = _is_true(options.include_dirs, True)
    for entry in sorted(found, key=lambda item: str(item["path"])):
        if (include or not entry["isDirectory"]) and (entry["isDirectory"] or not only_directories):
            yield entry


@method("expandGlob", schema.Glob)
async def expand_glob(connection: Connection, params: schema.Glob) -> object:
    """Entries that a pattern leads to."""
    return await _deliver(connection, _expand(connection, params, params.options or params))
