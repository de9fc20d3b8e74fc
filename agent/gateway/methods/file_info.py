"""Convert file metadata and times between the API and the SDKs."""

from __future__ import annotations

import stat
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from agent.gateway.errors import CallError
from agent.gateway.methods.params.common import TimeValue
from sandboxd.v1 import file_pb2 as pb

_Type = pb.FileInfo.Type
_FORMAT = {
    _Type.TYPE_FILE: stat.S_IFREG, _Type.TYPE_DIRECTORY: stat.S_IFDIR, _Type.TYPE_SYMLINK: stat.S_IFLNK,
    _Type.TYPE_BLOCK_DEVICE: stat.S_IFBLK, _Type.TYPE_CHARACTER_DEVICE: stat.S_IFCHR, _Type.TYPE_FIFO: stat.S_IFIFO,
    _Type.TYPE_SOCKET: stat.S_IFSOCK,
}  # fmt: skip
_FIRST_S, _LAST_S = -62_135_596_800, 253_402_300_799  # years 1 to 9999, the range of datetime


def _iso(time: Timestamp) -> str:
    seconds = min(max(time.seconds, _FIRST_S), _LAST_S)
    moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=time.nanos // 1000 % 1_000_000)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def file_info(info: pb.FileInfo) -> dict[str, object]:
    """Return a FileInfo in the SDKs' form."""
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
    """Return the three type flags of a directory entry."""
    return {
        "isFile": info.type == _Type.TYPE_FILE, "isDirectory": info.type == _Type.TYPE_DIRECTORY,
        "isSymlink": info.type == _Type.TYPE_SYMLINK,
    }  # fmt: skip


def times(atime: TimeValue, mtime: TimeValue) -> dict[str, Any]:
    """Return the fields access_time and modify_time of a request.

    :raises CallError: a value is not a time, or is out of range.
    """
    return {"access_time": _timestamp(atime), "modify_time": _timestamp(mtime)}


def _timestamp(value: TimeValue) -> Timestamp:
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            micros = round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1e6)
        else:
            micros = round(value * 1e6)
        result = Timestamp()
        result.FromMicroseconds(micros)
    except (ValueError, OverflowError):
        raise CallError("TypeError", f"{value!r:.80} is not a time: give a date, or seconds since 1970") from None
    return result
