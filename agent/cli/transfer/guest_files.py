"""File operations in a sandbox by paths that are bytes, while the API's paths are UTF-8.

A path that is valid UTF-8 goes through FileService. For any other one, a shell in the guest gets the path as octal
escapes and uses the image's find, cat, mkdir, ln, chmod, touch and readlink.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from agent.cli.errors import CliError
from agent.cli.transfer.entry import Entry, Kind
from agent.cli.transfer.guest_shell import GuestShell
from agent.common.api_client import Api, is_cut_off, opened

if TYPE_CHECKING:
    from sandboxd.v1.file_pb2 import FileInfo

_REPLACED = "\N{REPLACEMENT CHARACTER}"
_FIELDS = "%y\\0%m\\0%s\\0%T@\\0%l\\0%p\\0"  # of `_parsed`: type, mode, size, mtime, link target, path


def _utf8(path: bytes) -> str | None:
    try:
        return path.decode()
    except UnicodeDecodeError:
        return None


class GuestFiles:
    """Reads and writes files of one sandbox as its root user.

    Every method raises grpc.aio.AioRpcError if FileService fails, and CliError if the shell does.
    """

    def __init__(self, api: Api, sandbox_id: str) -> None:
        self._files = api.files
        self._id = sandbox_id
        self._shell = GuestShell(api, sandbox_id)

    async def stat(self, path: bytes, *, follow: bool) -> Entry | None:
        """Return the facts of a file, or None if it does not exist."""
        import grpc

        from sandboxd.v1 import file_pb2

        text = _utf8(path)
        if text is None:
            return await anext(self._find(path, follow=follow, depth=0), None)
        try:
            request = file_pb2.StatRequest(sandbox_id=self._id, path=text, no_follow=not follow)
            return await self._entry(await self._files.Stat(request))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND and await self._sandbox_exists():
                return None
            raise

    async def _sandbox_exists(self) -> bool:
        """Return True; NOT_FOUND for a file and for the whole sandbox is the same gRPC status.

        :raises grpc.aio.AioRpcError: NOT_FOUND, the sandbox does not exist.
        """
        from sandboxd.v1 import file_pb2

        await self._files.Stat(file_pb2.StatRequest(sandbox_id=self._id, path="/"))
        return True

    async def _entry(self, info: FileInfo) -> Entry:
        path = info.path_bytes or info.path.encode()
        kind = {1: Kind.FILE, 2: Kind.DIRECTORY, 3: Kind.LINK}.get(info.type, Kind.OTHER)
        target = info.link_target.encode()
        if _REPLACED in info.link_target:  # the API has no bytes of a target, and puts this for each invalid one
            target = await self._shell.collect('exec readlink -n "$1"', path)
        mtime_ns = info.modify_time.seconds * 10**9 + info.modify_time.nanos
        return Entry(path, kind, info.size_bytes, info.mode, mtime_ns, target)

    async def walk(self, root: bytes) -> AsyncIterator[Entry]:
        """Yield the files below a directory, parents first. The guest chooses the paths: check them."""
        from sandboxd.v1 import file_pb2

        text = _utf8(root)
        if text is None:
            async for entry in self._find(root, follow=True, depth=None):
                if entry.path != root:
                    yield entry
            return
        async for page in self._files.Walk(file_pb2.WalkRequest(sandbox_id=self._id, path=text)):
            for info in page.entries:
                if info.path_bytes or info.path != text:
                    yield await self._entry(info)

    async def _find(self, path: bytes, *, follow: bool, depth: int | None) -> AsyncIterator[Entry]:
        flags = ("-H" if follow else "-P", "" if depth is None else f"-maxdepth {depth}")
        script = f"""exec find {flags[0]} "$1" {flags[1]} -printf '{_FIELDS}'"""
        if depth == 0:
            script = f'[ -e "$1" ] || [ -L "$1" ] || exit 0; {script}'
        async for fields in self._shell.records(script, 6, path):
            yield _parsed(fields)

    async def read(self, path: bytes) -> AsyncIterator[bytes]:
        """Yield the content of a file in pieces."""
        from sandboxd.v1 import file_pb2

        text = _utf8(path)
        if text is None:
            async for data in self._shell.run('exec cat "$1"', path):
                yield data
            return
        async for piece in self._files.ReadFile(file_pb2.ReadFileRequest(sandbox_id=self._id, path=text)):
            yield piece.data

    async def write(self, path: bytes, mode: int, data: AsyncIterator[bytes]) -> None:
        """Write `data` to a file; a new one gets the permission bits `mode`."""
        import grpc

        from sandboxd.v1 import file_pb2

        text = _utf8(path)
        if text is None:
            script = f'[ -e "$1" ] || {{ : > "$1" && chmod {mode:o} "$1"; }} && exec cat > "$1"'
            await self._shell.collect(script, path, stdin=data)
            return
        call = opened(self._files.WriteFile)
        try:
            # A write to a call that has ended raises one of these; awaiting the call raises the reason.
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
                    f"the sandbox refused the rest of {text}: is its disk full? Run `df` in it", reason="UPLOAD_CUT_OFF"
                ) from error
            raise
        finally:
            call.cancel()

    async def make_directory(self, path: bytes, mode: int) -> bool:
        """Create a directory unless it exists; return whether it is new."""
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
            if found is None or found.kind is not Kind.DIRECTORY:
                raise
            return False
        return True

    async def make_link(self, path: bytes, target: bytes) -> None:
        """Create a symbolic link, in place of an existing file or link; an existing directory is an error."""
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

    async def set_metadata(self, path: bytes, mode: int, mtime_ns: int) -> None:
        """Set the permission bits, and the modification and access time to `mtime_ns`."""
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
    """Return the entry for one record of `_FIELDS`.

    :raises CliError: the guest wrote something else.
    """
    kind, mode, size, mtime, target, path = fields
    try:
        seconds, _, fraction = mtime.partition(b".")
        nanos = int(seconds) * 10**9 + int(fraction[:9].ljust(9, b"0"))
        kinds = {b"f": Kind.FILE, b"d": Kind.DIRECTORY, b"l": Kind.LINK}
        return Entry(path, kinds.get(kind, Kind.OTHER), int(size), int(mode, 8) & 0o7777, nanos, target)
    except ValueError:
        raise CliError("the output of find(1) in the sandbox is malformed", reason="GUEST_MALFORMED") from None
