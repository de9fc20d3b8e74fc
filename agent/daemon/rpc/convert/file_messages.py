"""Check fields of requests of file.proto, and convert guests' descriptions of files to its messages."""

from __future__ import annotations

from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from agent.common.errors import InvalidSpec
from agent.daemon.rpc.convert.guest_values import guest_int, guest_text, malformed, printable
from agent.daemon.rpc.convert.times import timestamp_ns
from sandboxd.v1 import file_pb2 as pb

_MAX_PATH_BYTES = 4095
_TYPES = {
    "file": pb.FileInfo.TYPE_FILE, "directory": pb.FileInfo.TYPE_DIRECTORY, "symlink": pb.FileInfo.TYPE_SYMLINK,
    "other": pb.FileInfo.TYPE_OTHER, "block": pb.FileInfo.TYPE_BLOCK_DEVICE,
    "character": pb.FileInfo.TYPE_CHARACTER_DEVICE, "fifo": pb.FileInfo.TYPE_FIFO, "socket": pb.FileInfo.TYPE_SOCKET,
}  # fmt: skip


def path(text: str, name: str = "path") -> str:
    """Return `text` if it can be a path.

    :param name: of the field, for the error message.
    :raises InvalidSpec: it is empty, has a NUL character, or is longer than Linux allows.
    """
    size = len(text.encode())
    if not 0 < size <= _MAX_PATH_BYTES or "\0" in text:
        raise InvalidSpec(f"{name} has {size} bytes; a path has 1 to {_MAX_PATH_BYTES} bytes and no NUL character")
    return text


def count(value: int, name: str) -> int:
    """Return `value`.

    :raises InvalidSpec: it is negative.
    """
    if value < 0:
        raise InvalidSpec(f"{name} is {value}; it must not be negative")
    return value


def mode_bits(value: int) -> int:
    """Return `value`.

    :raises InvalidSpec: it is not within the permission bits 0 to 07777.
    """
    if not 0 <= value <= 0o7777:
        raise InvalidSpec(f"mode is {value:#o}; it must be from 0 to 07777")
    return value


def nanoseconds(value: Timestamp) -> int:
    """Return nanoseconds since 1970.

    :raises InvalidSpec: the time is outside of protobuf's range.
    """
    try:
        return value.ToNanoseconds()
    except ValueError as error:
        raise InvalidSpec(f"the time is not valid: {error}") from None


def info(values: dict[str, Any]) -> pb.FileInfo:
    """Return the message for a guest's description of one file.

    :raises GuestUnreachable: the description is malformed.
    """
    raw = values.get("path")
    kind = _TYPES.get(str(values.get("type")))
    if not isinstance(raw, str) or kind is None:
        raise malformed("path or type of a file")
    shown = printable(raw)
    message = pb.FileInfo(
        path=shown, path_bytes=b"" if shown == raw else raw.encode(errors="surrogateescape"), type=kind,
        size_bytes=guest_int(values, "size"), mode=guest_int(values, "mode", 0, 0o7777),
        uid=_id(values, "uid"), gid=_id(values, "gid"),
        modify_time=_time(values, "mtime_ns"), access_time=_time(values, "atime_ns"),
        change_time=_time(values, "ctime_ns"), link_count=guest_int(values, "nlink"),
        inode=guest_int(values, "ino", 0, (1 << 64) - 1),
        device=guest_int(values, "dev", 0, (1 << 64) - 1), blocks=guest_int(values, "blocks"),
        block_size=guest_int(values, "blksize"),
        device_number=guest_int(values, "rdev", 0, (1 << 64) - 1),
    )  # fmt: skip
    if kind == pb.FileInfo.TYPE_SYMLINK:
        message.link_target = guest_text(values, "target")
    return message


def _id(values: dict[str, Any], name: str) -> int:
    number = guest_int(values, name, 0, (1 << 32) - 1)
    return number - (1 << 32) if number > (1 << 31) - 1 else number


def _time(values: dict[str, Any], name: str) -> Any:
    return timestamp_ns(guest_int(values, name, -(1 << 62), 1 << 62))
