"""The files of a sandbox by their exact names, which are bytes; the API's paths are UTF-8.

What has a name in UTF-8 goes through FileService. The rest is done by a shell in the guest that gets the name as octal
escapes: sh, find, cat, mkdir, ln, chmod and touch of the image.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from agent.cli.errors import CliError
from agent.cli.transfer.guest_shell import GuestShell
from agent.common.api_client import Api, is_cut_off, opened

if TYPE_CHECKING:
    from sandboxd.v1.file_pb2 import FileInfo

_HOME = b"/home/sandbox"  # where relative paths of the API start
_REPLACED = "\N{REPLACEMENT CHARACTER}"


class Kind(StrEnum):
    """Kinds of files that matter here."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "link"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, here or there. `target` is a symbolic link's."""

    path: bytes
    kind: Kind
    size_bytes: int
    mode: int
    mtime_ns: int
    target: bytes = b""


def kind_of(mode: int) -> Kind:
    """Returns the kind for st_mode."""
    if stat.S_ISREG(mode):
        return Kind.FILE
    return Kind.FOLDER if stat.S_ISDIR(mode) else Kind.LINK if stat.S_ISLNK(mode) else Kind.OTHER


def absolute(path: str) -> bytes:
    """Returns a path of the guest as the API takes it."""
    raw = os.fsencode(path)
    return raw if raw.startswith(b"/") else b"/".join((_HOME, raw)) if raw else _HOME


def _utf8(path: bytes) -> str | None:
    try:
        return path.decode()
    except UnicodeDecodeError:
        return None


class GuestFiles:
    """Calls on files of one sandbox, as its root. Errors are those of FileService, and CliError from the shell."""

    def __init__(self, api: Api, sandbox_id: str) -> None:
        self._files = api.files
        self._id = sandbox_id
        self._shell = GuestShell(api, sandbox_id)

    async def stat(self, path: bytes, *, follow: bool) -> Entry | None:
        """Returns a file's facts, or None where there is none."""
        import grpc

        from sandboxd.v1 import file_pb2

        text = _utf8(path)
        if text is None:
            return await anext(self._found(path, follow=follow, depth=0), None)
        try:
            request = file_pb2.StatRequest(sandbox_id=self._id, path=text, no_follow=not follow)
            return await self._entry(await self._files.Stat(request))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND and await self._exists():
                return None
            raise

    async def _exists(self) -> bool:
        """Tells a file that is missing from a sandbox that is. :raises grpc.aio.AioRpcError: NOT_FOUND."""
        from sandboxd.v1 import file_pb2

        await self._files.Stat(file_pb2.StatRequest(sandbox_id=self._id, path="/"))
        return True

    async def _entry(self, info: FileInfo) -> Entry:
        path = info.path_bytes or info.path.encode()
        kind = {1: Kind.FILE, 2: Kind.FOLDER, 3: Kind.LINK}.get(info.type, Kind.OTHER)
        target = info.link_target.encode()
        if _REPLACED in info.link_target:  # or what stands in a name for a byte that is not UTF-8
            target = await self._shell.collect('exec readlink -n "$1"', path)
        mtime_ns = info.modify_time.seconds * 10**9 + info.modify_time.nanos
        return Entry(path, kind, info.size_bytes, info.mode, mtime_ns, target)

    async def walk(self, root: bytes) -> AsyncIterator[Entry]:
        """Yields what is below a folder, parents first, as the guest says it: check the paths."""
        from sandboxd.v1 import file_pb2

        text = _utf8(root)
        if text is None:
            async for entry in self._found(root, follow=True, depth=None):
                if entry.path != root:
                    yield entry
            return
        async for page in self._files.Walk(file_pb2.WalkRequest(sandbox_id=self._id, path=text)):
            for info in page.entries:
                if info.path_bytes or info.path != text:
                    yield await self._entry(info)

    async def _found(self, path: bytes, *, follow: bool, depth: int | None) -> AsyncIterator[Entry]:
        flags = ("-H" if follow else "-P", "" if depth is None else f"-maxdepth {depth}")
        script = f"""exec find {flags[0]} "$1" {flags[1]} -printf '%y\\0%m\\0%s\\0%T@\\0%l\\0%p\\0'"""
        if depth == 0:
            script = f'[ -e "$1" ] || [ -L "$1" ] || exit 0; {script}'
        async for fields in self._shell.records(script, 6, path):
            yield _parsed(fields)

    async def read(self, path: bytes) -> AsyncIterator[bytes]:
        """Yields the bytes of a file."""
        from sandboxd.v1 import file_pb2

        text = _utf8(path)
        if text is None:
            async for data in self._shell.run('exec cat "$1"', path):
                yield data
            return
        async for piece in self._files.ReadFile(file_pb2.ReadFileRequest(sandbox_id=self._id, path=text)):
            yield piece.data

    async def write(self, path: bytes, mode: int, data: AsyncIterator[bytes]) -> None:
        """Makes or overwrites a file; the mode is that of a new one."""
        import grpc

        from sandboxd.v1 import file_pb2

        text = _utf8(path)
        if text is None:
            script = f'[ -e "$1" ] || {{ : > "$1" && chmod {mode:o} "$1"; }} && exec cat > "$1"'
            await self._shell.collect(script, path, stdin=data)
            return
        call = opened(self._files.WriteFile)
        try:
            # A call that has ended fails in one of these ways here; awaiting it says why it ended.
            with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                first = file_pb2.WriteFileRequest.Open(sandbox_id=self._id, path=text, mode=mode)
                await call.write(file_pb2.WriteFileRequest(open=first))
                async for piece in data:
                    await call.write(file_pb2.WriteFileRequest(data=piece))
                await call.done_writing()
            await call
        except grpc.aio.AioRpcError as error:
            if is_cut_off(error):
                raise CliError(
                    f"the sandbox stopped taking {text}: is its disk full? See `df` there", reason="UPLOAD_CUT_OFF"
                ) from error
            raise
        finally:
            call.cancel()

    async def make_folder(self, path: bytes, mode: int) -> bool:
        """Ensures that a folder is there; returns whether it is new."""
        import grpc

        from sandboxd.v1 import file_pb2

        text = _utf8(path)
        if text is None:
            made = await self._shell.collect('[ -d "$1" ] || { mkdir "$1" && echo made; }', path)
            return bool(made)
        try:
            await self._files.MakeDirectory(file_pb2.MakeDirectoryRequest(sandbox_id=self._id, path=text, mode=mode))
        except grpc.aio.AioRpcError as error:
            found = await self.stat(path, follow=True) if error.code() is grpc.StatusCode.ALREADY_EXISTS else None
            if found is None or found.kind is not Kind.FOLDER:
                raise
            return False
        return True

    async def make_link(self, path: bytes, target: bytes) -> None:
        """Makes a symbolic link, in the place of what is there unless that is a folder."""
        import grpc

        from sandboxd.v1 import file_pb2

        text, target_text = _utf8(path), _utf8(target)
        if text is None or target_text is None:
            await self._shell.collect('{ [ -d "$1" ] && [ ! -L "$1" ]; } || exec ln -sfn "$2" "$1"', path, target)
            return
        request = file_pb2.SymlinkRequest(sandbox_id=self._id, target=target_text, new_path=text)
        try:
            await self._files.Symlink(request)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                raise
            await self._files.Remove(file_pb2.RemoveRequest(sandbox_id=self._id, path=text))
            await self._files.Symlink(request)

    async def set_facts(self, path: bytes, mode: int, mtime_ns: int) -> None:
        """Sets permission bits and modification time; the access time becomes the same."""
        from google.protobuf.timestamp_pb2 import Timestamp

        from sandboxd.v1 import file_pb2

        text = _utf8(path)
        seconds, nanos = divmod(mtime_ns, 10**9)
        if text is None:
            await self._shell.collect(f'chmod {mode:o} "$1" && exec touch -d @{seconds}.{nanos:09d} "$1"', path)
            return
        await self._files.Chmod(file_pb2.ChmodRequest(sandbox_id=self._id, path=text, mode=mode))
        times = Timestamp(seconds=seconds, nanos=nanos)
        await self._files.SetTimes(
            file_pb2.SetTimesRequest(sandbox_id=self._id, path=text, modify_time=times, access_time=times)
        )


def _parsed(fields: list[bytes]) -> Entry:
    kind, mode, size, mtime, target, path = fields
    try:
        seconds, _, fraction = mtime.partition(b".")
        nanos = int(seconds) * 10**9 + int(fraction[:9].ljust(9, b"0"))
        kinds = {b"f": Kind.FILE, b"d": Kind.FOLDER, b"l": Kind.LINK}
        return Entry(path, kinds.get(kind, Kind.OTHER), int(size), int(mode, 8) & 0o7777, nanos, target)
    except ValueError:
        raise CliError("the sandbox's find(1) answers with nonsense", reason="GUEST_MALFORMED") from None
