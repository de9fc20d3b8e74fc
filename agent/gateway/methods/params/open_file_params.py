"""Parameters of the methods on open files."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from agent.gateway.jsonrpc.messages import Params
from agent.gateway.methods.params.common import Id, Mode, Size, TimeValue


class OpenOptions(msgspec.Struct, rename="camel"):
    """Options of open."""

    read: bool | None = None
    write: bool | None = None
    append: bool | None = None
    truncate: bool | None = None
    create: bool | None = None
    create_new: bool | None = None
    mode: Mode | None = None


class Open(Params):
    """Parameters of open."""

    path: str
    options: OpenOptions | None = None


class Handle(Params):
    """Parameters of the methods on an open file."""

    file_handle_id: Id


class HandleRead(Handle):
    """Parameters of fileRead."""

    length: Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]


class HandleWrite(Handle):
    """Parameters of fileWrite."""

    data: bytes


class HandleSeek(Handle):
    """Parameters of fileSeek; a JavaScript bigint arrives as a string."""

    offset: int | float | Annotated[str, Meta(pattern=r"^-?[0-9]{1,19}$")]
    whence: Literal[0, 1, 2]


class HandleTruncate(Handle):
    """Parameters of fileTruncate; the Python SDK sends `size`."""

    len: Size | None = None
    size: Size | None = None


class HandleLock(Handle):
    """Parameters of fileLock."""

    exclusive: bool | None = None


class HandleUtime(Handle):
    """Parameters of fileUtime."""

    atime: TimeValue
    mtime: TimeValue
