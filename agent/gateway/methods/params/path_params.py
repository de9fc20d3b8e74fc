"""Parameters of the methods on paths of a sandbox."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from agent.gateway.jsonrpc.messages import Params
from agent.gateway.methods.params.common import Id, Mode, Owner, Size, TimeValue


class PathOnly(Params):
    """Parameters of the methods on one path."""

    path: str


class Read(Params):
    """Parameters of readFile and readTextFile."""

    path: str
    abort_id: Id | None = None


class WriteOptions(msgspec.Struct, rename="camel"):
    """Options of writeFile and writeTextFile."""

    append: bool | None = None
    create: bool | None = None
    create_new: bool | None = None
    mode: Mode | None = None


class Write(Params):
    """Parameters of writeFile."""

    path: str
    abort_id: Id | None = None
    options: WriteOptions | None = None
    content: bytes | None = None
    content_stream_id: Id | None = None


class WriteText(Params):
    """Parameters of writeTextFile."""

    path: str
    abort_id: Id | None = None
    options: WriteOptions | None = None
    content: str | None = None
    content_stream_id: Id | None = None


class RemoveOptions(msgspec.Struct):
    """Options of remove."""

    recursive: bool | None = None


class Remove(Params):
    """Parameters of remove."""

    path: str
    options: RemoveOptions | None = None


class MkdirOptions(msgspec.Struct):
    """Options of mkdir."""

    recursive: bool | None = None
    mode: Mode | None = None


class Mkdir(Params):
    """Parameters of mkdir."""

    path: str
    options: MkdirOptions | None = None


class Rename(Params):
    """Parameters of rename."""

    old_path: str
    new_path: str


class Chmod(Params):
    """Parameters of chmod."""

    path: str
    mode: Mode


class Chown(Params):
    """Parameters of chown; null leaves the owner or group unchanged."""

    path: str
    uid: Owner | None = None
    gid: Owner | None = None


class CopyFile(Params):
    """Parameters of copyFile."""

    from_path: str
    to_path: str


class MakeLink(Params):
    """Parameters of link and symlink; the options of symlink have no effect on Linux and are ignored."""

    target: str
    path: str


class TempOptions(msgspec.Struct):
    """Directory and name of a temporary file."""

    dir: str | None = None
    prefix: str | None = None
    suffix: str | None = None


class Temp(Params):
    """Parameters of makeTempDir and makeTempFile."""

    options: TempOptions | None = None


class Truncate(Params):
    """Parameters of truncate; `name` is the path."""

    name: str
    length: Size | None = None


class Umask(Params):
    """Parameters of umask."""

    mask: Annotated[int, Meta(ge=0, le=0o777)] | None = None


class Utime(Params):
    """Parameters of utime."""

    path: str
    atime: TimeValue
    mtime: TimeValue


class Pattern(msgspec.Struct):
    """A JavaScript RegExp."""

    source: str
    flags: str = ""


class WalkOptions(msgspec.Struct, rename="camel"):
    """Options of walk."""

    max_depth: float | None = None
    include_files: bool | None = None
    include_dirs: bool | None = None
    include_symlinks: bool | None = None
    follow_symlinks: bool | None = None
    canonicalize: bool | None = None
    exts: list[str] | None = None
    match: list[Pattern] | None = None
    skip: list[Pattern] | None = None


class Walk(Params, WalkOptions, kw_only=True, rename="camel"):
    """Parameters of walk; the Python SDK nests the options."""

    path: str
    options: WalkOptions | None = None


class GlobOptions(msgspec.Struct, rename="camel"):
    """Options of expandGlob."""

    root: str | None = None
    exclude: list[str] | None = None
    include_dirs: bool | None = None
    follow_symlinks: bool | None = None
    canonicalize: bool | None = None
    extended: bool | None = None
    globstar: bool | None = None
    case_insensitive: bool | None = None


class Glob(Params, GlobOptions, kw_only=True, rename="camel"):
    """Parameters of expandGlob; the Python SDK nests the options."""

    glob: str
    options: GlobOptions | None = None
