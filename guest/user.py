"""Look up users in /etc/passwd and /etc/group (passwd(5), group(5)), without loading the NSS modules."""

from __future__ import annotations

import os

from guest.wire import CallError


class User:
    """A user; `groups` are the ids of all its groups, the primary one included."""

    __slots__ = ("gid", "groups", "home", "name", "shell", "uid")

    def __init__(self, name: str, uid: int, gid: int, groups: list[int], home: str, shell: str) -> None:
        self.name = name
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.home = home
        self.shell = shell


_cache: dict[str, User] = {}
_cache_key: tuple[int, ...] = ()


def lookup_user(text: str) -> User:
    """Return the user with this name or numeric id; an id need not be in /etc/passwd.

    :raises CallError: USER_UNKNOWN: no user has this name.
    """
    global _cache_key  # noqa: PLW0603  one cache, valid as long as both files are
    key = tuple(os.stat(path).st_mtime_ns for path in ("/etc/passwd", "/etc/group"))
    if key != _cache_key:
        _cache.clear()
        _cache_key = key
    user = _cache.get(text)
    if user is None:
        user = _cache[text] = _find(text)
    return user


def _lines(path: str) -> list[list[str]]:
    with open(path, errors="surrogateescape") as file:
        return [line.rstrip("\n").split(":") for line in file]


def _find(text: str) -> User:
    for fields in _lines("/etc/passwd"):
        if len(fields) >= 7 and text in (fields[0], fields[2]):
            uid, gid = int(fields[2]), int(fields[3])
            return User(fields[0], uid, gid, _groups(fields[0], gid), fields[5] or "/", fields[6] or "/bin/sh")
    if text.isdecimal() and int(text) < 1 << 32:
        number = int(text)
        return User(text, number, number, [number], "/", "/bin/sh")
    raise CallError(
        "STATE", f"no user {text[:64]!r} in this image; use a name from /etc/passwd or a number", "USER_UNKNOWN"
    )


def _groups(name: str, gid: int) -> list[int]:
    found = {gid}
    for fields in _lines("/etc/group"):
        if len(fields) >= 4 and name in fields[3].split(","):
            found.add(int(fields[2]))
    return sorted(found)
