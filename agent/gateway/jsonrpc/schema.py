"""Parameters of every method, as msgspec types: what does not fit is refused before a handler sees it.

Unknown members are ignored, and null is the same as absent, as both SDKs have it. Bytes are base64 in JSON.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Id = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Mode = Annotated[int, Meta(ge=0, le=0o177777)]
Size = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Owner = Annotated[int, Meta(ge=0, le=(1 << 32) - 2)]
Time = str | float
# "inherit" reaches us from the Python SDK alone, and means that the client shows the output itself.
Output = Literal["piped", "null", "inherit"]


class Params(msgspec.Struct, rename="camel"):
    """Parameters of a method. `abort_id` may come with any: the client may end the call by it."""


class Nothing(Params):
    """No parameters."""


class Abort(Params, rename={"target": "abortId"}):
    """Of abort. The call itself cannot be ended, so its member has another name here."""

    target: Id


# -- files -------------------------------------------------------------------------------------------------------------


class Path(Params):
    """Of the methods that have a path alone."""

    path: str


class Read(Params):
    """Of readFile and readTextFile."""

    path: str
    abort_id: Id | None = None


class WriteOptions(msgspec.Struct, rename="camel"):
    """How a file is written."""

    append: bool | None = None
    create: bool | None = None
    create_new: bool | None = None
    mode: Mode | None = None


class Write(Params):
    """Of writeFile."""

    path: str
    abort_id: Id | None = None
    options: WriteOptions | None = None
    content: bytes | None = None
    content_stream_id: Id | None = None


class WriteText(Params):
    """Of writeTextFile."""

    path: str
    abort_id: Id | None = None
    options: WriteOptions | None = None
    content: str | None = None
    content_stream_id: Id | None = None


class RemoveOptions(msgspec.Struct):
    """How a file is removed."""

    recursive: bool | None = None


class Remove(Params):
    """Of remove."""

    path: str
    options: RemoveOptions | None = None


class MkdirOptions(msgspec.Struct):
    """How a directory is made."""

    recursive: bool | None = None
    mode: Mode | None = None


class Mkdir(Params):
    """Of mkdir."""

    path: str
    options: MkdirOptions | None = None


class Rename(Params):
    """Of rename."""

    old_path: str
    new_path: str


class Chmod(Params):
    """Of chmod."""

    path: str
    mode: Mode


class Chown(Params):
    """Of chown; null leaves it."""

    path: str
    uid: Owner | None = None
    gid: Owner | None = None


class CopyFile(Params):
    """Of copyFile."""

    from_path: str
    to_path: str


class Link(Params):
    """Of link and symlink, whose options mean nothing on Linux."""

    target: str
    path: str


class TempOptions(msgspec.Struct):
    """Where a temporary file is made, and how it is called."""

    dir: str | None = None
    prefix: str | None = None
    suffix: str | None = None


class Temp(Params):
    """Of makeTempDir and makeTempFile."""

    options: TempOptions | None = None


class Truncate(Params):
    """Of truncate, which calls its path a name."""

    name: str
    length: Size | None = None


class Umask(Params):
    """Of umask."""

    mask: Annotated[int, Meta(ge=0, le=0o777)] | None = None


class Utime(Params):
    """Of utime: ISO 8601, or seconds since 1970."""

    path: str
    atime: Time
    mtime: Time


class OpenOptions(msgspec.Struct, rename="camel"):
    """How a file is opened."""

    read: bool | None = None
    write: bool | None = None
    append: bool | None = None
    truncate: bool | None = None
    create: bool | None = None
    create_new: bool | None = None
    mode: Mode | None = None


class Open(Params):
    """Of open."""

    path: str
    options: OpenOptions | None = None


class Handle(Params):
    """Of the methods that have an open file alone."""

    file_handle_id: Id


class HandleRead(Handle):
    """Of fileRead."""

    length: Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]


class HandleWrite(Handle):
    """Of fileWrite."""

    data: bytes


class HandleSeek(Handle):
    """Of fileSeek; a JavaScript bigint arrives as text."""

    offset: int | float | Annotated[str, Meta(pattern=r"^-?[0-9]{1,19}$")]
    whence: Literal[0, 1, 2]


class HandleTruncate(Handle):
    """Of fileTruncate; the Python SDK says `size`."""

    len: Size | None = None
    size: Size | None = None


class HandleLock(Handle):
    """Of fileLock."""

    exclusive: bool | None = None


class HandleUtime(Handle):
    """Of fileUtime."""

    atime: Time
    mtime: Time


class Pattern(msgspec.Struct):
    """A JavaScript RegExp."""

    source: str
    flags: str = ""


class WalkOptions(msgspec.Struct, rename="camel"):
    """Which entries of a tree are wanted."""

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
    """Of walk; the Python SDK nests the options."""

    path: str
    options: WalkOptions | None = None


class GlobOptions(msgspec.Struct, rename="camel"):
    """How a pattern is meant."""

    root: str | None = None
    exclude: list[str] | None = None
    include_dirs: bool | None = None
    follow_symlinks: bool | None = None
    canonicalize: bool | None = None
    extended: bool | None = None
    globstar: bool | None = None
    case_insensitive: bool | None = None


class Glob(Params, GlobOptions, kw_only=True, rename="camel"):
    """Of expandGlob; the Python SDK nests the options."""

    glob: str
    options: GlobOptions | None = None


# -- processes ---------------------------------------------------------------------------------------------------------


class Start(Params):
    """What all methods that start a process have in common."""

    env: dict[str, str] | None = None
    clear_env: bool | None = None
    cwd: str | None = None
    stdin_stream_id: Id | None = None
    stdout: Output | None = None
    stderr: Output | None = None


class Spawn(Start, kw_only=True):
    """Of spawn."""

    command: str
    args: list[str] | None = None


class SpawnDeno(Start, kw_only=True):
    """Of spawnDeno."""

    entrypoint: str | None = None
    watch: bool | list[str] | None = None
    code: str | None = None
    extension: Literal["js", "cjs", "mjs", "ts", "cts", "mts", "jsx", "tsx"] | None = None
    script_args: list[str] | None = None


class SpawnRepl(Start, kw_only=True):
    """Of spawnDenoRepl."""

    script_args: list[str] | None = None


class Pid(Params):
    """Of the methods that have a process alone."""

    pid: Id


class Kill(Pid):
    """Of processKill."""

    signal: str | None = None


class ReplEval(Pid):
    """Of denoReplEval."""

    code: str


class ReplCall(Pid):
    """Of denoReplCall."""

    fn: str
    args: list[Any] = []


class Vscode(Params):
    """Of vscode."""

    path: str
    extensions: list[str] = []
    env: dict[str, str] | None = None
    editor_settings: dict[str, Any] | None = None


# -- environment and network -------------------------------------------------------------------------------------------


class Key(Params):
    """Of envGet and envDelete."""

    key: str


class KeyValue(Key):
    """Of envSet."""

    value: str


class Fetch(Params):
    """Of fetch."""

    url: str
    method: str = "GET"
    headers: list[tuple[str, str]] = []
    redirect: Literal["follow", "manual", "error"] = "follow"
    abort_id: Id | None = None
    body_stream_id: Id | None = None
    pid: Id | None = None


class Expose(Params):
    """Of exposeHttp: a port, or whatever a process listens on."""

    domain: str
    port: Port | None = None
    pid: Id | None = None
