"""Method expandGlob, with the semantics of `expandGlob` in @std/fs."""

from __future__ import annotations

import posixpath
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

import grpc

from agent.gateway.jsonrpc.connection import RpcConnection
from agent.gateway.methods import patterns
from agent.gateway.methods.files import lstat, real_path
from agent.gateway.methods.params import path_params
from agent.gateway.methods.patterns import Matcher
from agent.gateway.methods.walk import Entry, WalkFilter, deliver_entries, make_entry, value_or, walk_tree

_GLOB_CHARACTERS = frozenset("*?[{(")


@dataclass(frozen=True)
class _GlobSearch:
    connection: RpcConnection
    options: WalkFilter
    globstar: bool
    compile: Callable[[str], Matcher]

    async def expand_segment(self, entries: list[Entry], segment: str) -> list[Entry]:
        """Return the entries that one segment of the pattern reaches from these, each path once."""
        if segment == "..":
            parents = dict.fromkeys(posixpath.dirname(str(entry["path"])) for entry in entries)
            return [make_entry(parent, await lstat(self.connection, parent)) for parent in parents]
        by_path = {str(entry["path"]): entry async for entry in self._descend(entries, segment)}
        return list(by_path.values())

    async def _descend(self, entries: list[Entry], segment: str) -> AsyncIterator[Entry]:
        for entry in entries:
            if not entry["isDirectory"]:
                continue
            at = str(entry["path"])
            if self.globstar and segment == "**":
                async for found in walk_tree(self.connection, at, replace(self.options, links=False)):
                    yield found
            else:
                matches = self.compile(segment)
                async for found in walk_tree(self.connection, at, replace(self.options, max_depth=1)):
                    if found["path"] != at and matches(posixpath.basename(str(found["path"]))):
                        yield found


async def _expand(
    connection: RpcConnection, params: path_params.Glob, options: path_params.GlobOptions
) -> AsyncIterator[Entry]:
    """Yield the entries that match a glob, ordered by path."""
    root = await real_path(connection, options.root or ".")
    search = _search(connection, root, options)
    start, segments = _literal_start(root, params.glob)
    try:
        found = [make_entry(start, await lstat(connection, start))]
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return
        raise
    if not search.options.enters(start):
        return
    for segment in segments:
        found = await search.expand_segment(found, segment)
    only_directories = params.glob.endswith("/")
    include_directories = value_or(options.include_dirs, True)
    for entry in sorted(found, key=lambda item: str(item["path"])):
        if (include_directories or not entry["isDirectory"]) and (entry["isDirectory"] or not only_directories):
            yield entry


def _search(connection: RpcConnection, root: str, options: path_params.GlobOptions) -> _GlobSearch:
    flags = {
        "extended": value_or(options.extended, True), "globstar": value_or(options.globstar, True),
        "case_insensitive": value_or(options.case_insensitive, False),
    }  # fmt: skip
    excluded: list[Matcher] = []
    for text in options.exclude or []:
        absolute = posixpath.normpath(posixpath.join(root, text))
        excluded += [patterns.from_glob(absolute, **flags), patterns.from_glob(f"{absolute}/**", **flags)]
    walk_filter = WalkFilter(
        follow=value_or(options.follow_symlinks, False), canonical=value_or(options.canonicalize, True),
        skip=tuple(excluded),
    )  # fmt: skip
    return _GlobSearch(connection, walk_filter, flags["globstar"], lambda segment: patterns.from_glob(segment, **flags))


def _literal_start(root: str, glob: str) -> tuple[str, list[str]]:
    """Return the directory of a glob's leading literal segments, and the remaining segments."""
    segments = [segment for segment in glob.split("/") if segment not in ("", ".")]
    start = "/" if glob.startswith("/") else root
    while segments and not _GLOB_CHARACTERS & set(segments[0]):
        start = posixpath.normpath(posixpath.join(start, segments.pop(0)))
    return start, segments


async def expand_glob(connection: RpcConnection, params: path_params.Glob) -> object:
    """Return the entries that match a glob."""
    return await deliver_entries(connection, _expand(connection, params, params.options or params))
