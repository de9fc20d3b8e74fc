"""Read parameters of a request, with checks of type and range."""

from __future__ import annotations

import os

from guest.user import User, lookup_user
from guest.wire import CallError

MAX_PATH_BYTES = 4095
HOME = "/home/sandbox"
_MAX_OFFSET = (1 << 63) - 1


def path(req: dict[str, object], name: str = "path") -> str:
    """Return parameter `name` as an absolute path; relative paths start at the home directory.

    :raises CallError: the path is missing, empty or too long, or has a NUL character.
    """
    value = req.get(name)
    if not isinstance(value, str) or not value or "\0" in value:
        raise CallError("INVALID", f"{name} must be a path without NUL characters")
    if len(os.fsencode(value)) > MAX_PATH_BYTES:
        raise CallError("INVALID", f"{name} is longer than {MAX_PATH_BYTES} bytes")
    return value if value.startswith("/") else f"{HOME}/{value}"


def number(req: dict[str, object], name: str, high: int = _MAX_OFFSET) -> int:
    """Return parameter `name`, an integer from 0 to `high`; 0 if absent.

    :raises CallError: it is not such an integer.
    """
    value = req.get(name) or 0
    if not isinstance(value, int) or not 0 <= value <= high:
        raise CallError("INVALID", f"{name} must be a number from 0 to {high}")
    return value


def optional_number(req: dict[str, object], name: str, high: int = _MAX_OFFSET) -> int | None:
    """Return parameter `name`, an integer from 0 to `high`; None if absent or null.

    :raises CallError: it is not such an integer.
    """
    return None if req.get(name) is None else number(req, name, high)


def mode(req: dict[str, object], default: int) -> int:
    """Return the permission bits in parameter "mode", or `default` if absent.

    :raises CallError: the value is not from 0 to 07777.
    """
    value = optional_number(req, "mode", 0o7777)
    return default if value is None else value


def times(req: dict[str, object]) -> tuple[int, int]:
    """Return (access time, modification time) in nanoseconds since 1970; now for an absent one.

    :raises CallError: a time is not an integer.
    """
    import time

    given = [req.get(name) for name in ("atime_ns", "mtime_ns")]
    if not all(value is None or isinstance(value, int) for value in given):
        raise CallError("INVALID", "times must be nanoseconds since 1970")
    now = time.time_ns()
    atime, mtime = (value if isinstance(value, int) else now for value in given)
    return atime, mtime


class AsUser:
    """Context manager that acts with the file-system rights of the request's user; may be entered repeatedly.

    The credentials are those of PID 1, which serves all calls: do not await in the `with` block.
    """

    __slots__ = ("user",)

    def __init__(self, req: dict[str, object]) -> None:
        name = req.get("user")
        self.user: User | None = lookup_user(str(name)) if name else None

    def __enter__(self) -> AsUser:
        if self.user is not None and self.user.uid:
            os.setgroups(self.user.groups)
            os.setegid(self.user.gid)
            os.seteuid(self.user.uid)
        return self

    def __exit__(self, *_: object) -> None:
        if self.user is not None and self.user.uid:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups([])
