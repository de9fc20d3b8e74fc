"""Serve FileService (file.proto). File contents are streamed under the guest link's flow control, never buffered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from agent.common.aio import cancel_and_wait
from agent.common.errors import AgentError, GuestUnreachable, InvalidSpec
from agent.common.telemetry import STREAM_BYTES
from agent.daemon.guestlink.stream import CallStream
from agent.daemon.rpc.convert.file_messages import count, info, mode_bits, nanoseconds, path
from agent.daemon.rpc.convert.guest_values import guest_int, guest_list, guest_text
from agent.daemon.rpc.services import open_file
from agent.daemon.rpc.services.streams import events, first_message
from agent.daemon.sandbox.service import SandboxService
from guest.wire import Frame
from sandboxd.v1 import file_pb2 as pb
from sandboxd.v1 import file_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
_DRAIN_TIMEOUT_S = 0.5
_OUT = STREAM_BYTES.labels("file", "from_guest")
_IN = STREAM_BYTES.labels("file", "to_guest")
_DISPOSITIONS = {
    pb.WriteFileRequest.Open.DISPOSITION_UNSPECIFIED: "truncate",
    pb.WriteFileRequest.Open.DISPOSITION_TRUNCATE: "truncate",
    pb.WriteFileRequest.Open.DISPOSITION_APPEND: "append",
    pb.WriteFileRequest.Open.DISPOSITION_CREATE_NEW: "create_new",
    pb.WriteFileRequest.Open.DISPOSITION_KEEP: "keep",
}
_WATCH_TYPES = {
    "create": pb.WatchResponse.TYPE_CREATE, "modify": pb.WatchResponse.TYPE_MODIFY,
    "remove": pb.WatchResponse.TYPE_REMOVE, "rename": pb.WatchResponse.TYPE_RENAME,
    "attributes": pb.WatchResponse.TYPE_ATTRIBUTES, "overflow": pb.WatchResponse.TYPE_OVERFLOW,
}  # fmt: skip


class FileServicer(file_pb2_grpc.FileServiceServicer):
    """Servicer of FileService, over the links to the guests."""

    def __init__(self, sandboxes: SandboxService) -> None:
        self._sandboxes = sandboxes

    async def _call(self, request: Any, op: str, /, **params: object) -> dict[str, Any]:
        """Call an operation of the guest as the request's user."""
        channel = self._sandboxes.channel(request.sandbox_id)
        # No limit here: copies and removals of large trees are ended by the client's own deadline.
        return await channel.call(op, timeout_s=None, user=request.user or None, **params)

    async def ReadFile(self, request: pb.ReadFileRequest, context: Context) -> AsyncIterator[pb.ReadFileResponse]:  # noqa: N802
        """See file.proto."""
        params = {
            "path": path(request.path), "offset": count(request.offset, "offset"),
            "length": count(request.length, "length"), "user": request.user or None,
        }  # fmt: skip
        channel = self._sandboxes.channel(request.sandbox_id)
        async with channel.stream("fs.read", **params) as stream:
            while (frame := await stream.recv()) is not None:
                if frame[0] is Frame.DATA:
                    _OUT.inc(len(frame[1]))
                    yield pb.ReadFileResponse(data=frame[1])

    async def WriteFile(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.WriteFileRequest], context: Context
    ) -> pb.WriteFileResponse:
        """See file.proto."""
        first = await first_message(request_iterator, "open")
        opened = first.open
        params = {
            "path": path(opened.path), "disposition": _DISPOSITIONS.get(opened.disposition, "truncate"),
            "offset": count(opened.offset, "offset"),
            "mode": mode_bits(opened.mode if opened.HasField("mode") else 0o644),
            "must_exist": opened.must_exist, "user": opened.user or None, "parents": opened.make_parents,
        }  # fmt: skip
        channel = self._sandboxes.channel(opened.sandbox_id)
        async with channel.stream("fs.write", **params) as stream:
            feeder = asyncio.create_task(_feed(stream, request_iterator))
            try:
                return await _written(stream, feeder)
            finally:
                await cancel_and_wait(feeder)

    async def Stat(self, request: pb.StatRequest, context: Context) -> pb.FileInfo:  # noqa: N802
        """See file.proto."""
        follow = not request.no_follow
        return info(await self._call(request, "fs.stat", path=path(request.path), follow=follow))

    async def _entries(self, request: Any, op: str, /, **params: object) -> AsyncIterator[list[pb.FileInfo]]:
        channel = self._sandboxes.channel(request.sandbox_id)
        async for page in events(channel.stream(op, user=request.user or None, **params)):
            yield [info(item) for item in guest_list(page, "entries")]

    async def ListDirectory(  # noqa: N802
        self, request: pb.ListDirectoryRequest, context: Context
    ) -> AsyncIterator[pb.ListDirectoryResponse]:
        """See file.proto."""
        async for entries in self._entries(request, "fs.list", path=path(request.path)):
            yield pb.ListDirectoryResponse(entries=entries)

    async def MakeDirectory(  # noqa: N802
        self, request: pb.MakeDirectoryRequest, context: Context
    ) -> pb.MakeDirectoryResponse:
        """See file.proto."""
        mode = mode_bits(request.mode if request.HasField("mode") else 0o755)
        await self._call(
            request, "fs.mkdir",
            path=path(request.path), parents=request.parents, mode=mode,
        )  # fmt: skip
        return pb.MakeDirectoryResponse()

    async def Remove(self, request: pb.RemoveRequest, context: Context) -> pb.RemoveResponse:  # noqa: N802
        """See file.proto."""
        await self._call(request, "fs.remove", path=path(request.path), recursive=request.recursive)
        return pb.RemoveResponse()

    async def Rename(self, request: pb.RenameRequest, context: Context) -> pb.RenameResponse:  # noqa: N802
        """See file.proto."""
        new_path = path(request.new_path, "new_path")
        await self._call(request, "fs.rename", path=path(request.path), new_path=new_path)
        return pb.RenameResponse()

    async def Copy(self, request: pb.CopyRequest, context: Context) -> pb.CopyResponse:  # noqa: N802
        """See file.proto."""
        await self._call(
            request, "fs.copy",
            path=path(request.path), new_path=path(request.new_path, "new_path"), recursive=request.recursive,
        )  # fmt: skip
        return pb.CopyResponse()

    async def Link(self, request: pb.LinkRequest, context: Context) -> pb.LinkResponse:  # noqa: N802
        """See file.proto."""
        new_path = path(request.new_path, "new_path")
        await self._call(request, "fs.link", path=path(request.path), new_path=new_path)
        return pb.LinkResponse()

    async def Symlink(self, request: pb.SymlinkRequest, context: Context) -> pb.SymlinkResponse:  # noqa: N802
        """See file.proto."""
        new_path = path(request.new_path, "new_path")
        await self._call(request, "fs.symlink", target=path(request.target, "target"), new_path=new_path)
        return pb.SymlinkResponse()

    async def ReadLink(self, request: pb.ReadLinkRequest, context: Context) -> pb.ReadLinkResponse:  # noqa: N802
        """See file.proto."""
        result = await self._call(request, "fs.readlink", path=path(request.path))
        return pb.ReadLinkResponse(target=guest_text(result, "target"))

    async def RealPath(self, request: pb.RealPathRequest, context: Context) -> pb.RealPathResponse:  # noqa: N802
        """See file.proto."""
        result = await self._call(request, "fs.realpath", path=path(request.path))
        return pb.RealPathResponse(path=guest_text(result, "path"))

    async def Chmod(self, request: pb.ChmodRequest, context: Context) -> pb.ChmodResponse:  # noqa: N802
        """See file.proto."""
        await self._call(request, "fs.chmod", path=path(request.path), mode=mode_bits(request.mode))
        return pb.ChmodResponse()

    async def Chown(self, request: pb.ChownRequest, context: Context) -> pb.ChownResponse:  # noqa: N802
        """See file.proto."""
        await self._call(
            request, "fs.chown", path=path(request.path), follow=not request.no_follow,
            uid=count(request.uid, "uid") if request.HasField("uid") else None,
            gid=count(request.gid, "gid") if request.HasField("gid") else None,
        )  # fmt: skip
        return pb.ChownResponse()

    async def SetTimes(self, request: pb.SetTimesRequest, context: Context) -> pb.SetTimesResponse:  # noqa: N802
        """See file.proto."""
        await self._call(
            request, "fs.utime", path=path(request.path),
            atime_ns=nanoseconds(request.access_time) if request.HasField("access_time") else None,
            mtime_ns=nanoseconds(request.modify_time) if request.HasField("modify_time") else None,
        )  # fmt: skip
        return pb.SetTimesResponse()

    async def Truncate(self, request: pb.TruncateRequest, context: Context) -> pb.TruncateResponse:  # noqa: N802
        """See file.proto."""
        size = count(request.size_bytes, "size_bytes")
        await self._call(request, "fs.truncate", path=path(request.path), size=size)
        return pb.TruncateResponse()

    async def MakeTemp(self, request: pb.MakeTempRequest, context: Context) -> pb.MakeTempResponse:  # noqa: N802
        """See file.proto."""
        result = await self._call(
            request, "fs.mktemp",
            directory=path(request.directory or "/tmp", "directory"),  # noqa: S108  the guest's
            prefix=request.prefix, suffix=request.suffix, make_directory=request.make_directory,
        )  # fmt: skip
        return pb.MakeTempResponse(path=guest_text(result, "path"))

    async def Walk(self, request: pb.WalkRequest, context: Context) -> AsyncIterator[pb.WalkResponse]:  # noqa: N802
        """See file.proto."""
        depth = count(request.max_depth, "max_depth") if request.HasField("max_depth") else None
        params = {"path": path(request.path), "max_depth": depth, "follow": request.follow_symlinks}
        async for entries in self._entries(request, "fs.walk", **params):
            yield pb.WalkResponse(entries=entries)

    async def Glob(self, request: pb.GlobRequest, context: Context) -> AsyncIterator[pb.GlobResponse]:  # noqa: N802
        """See file.proto."""
        params = {
            "pattern": path(request.pattern, "pattern"), "root": path(request.root or "/home/sandbox", "root"),
            "exclude_directories": request.exclude_directories, "include_hidden": request.include_hidden,
        }  # fmt: skip
        async for entries in self._entries(request, "fs.glob", **params):
            yield pb.GlobResponse(entries=entries)

    async def OpenFile(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.OpenFileRequest], context: Context
    ) -> AsyncIterator[pb.OpenFileResponse]:
        """See file.proto."""
        first = await first_message(request_iterator, "open")
        channel = self._sandboxes.channel(first.open.sandbox_id)
        async with channel.stream("fs.open", **open_file.open_params(first.open)) as stream:
            async for response in open_file.serve(stream, request_iterator):
                yield response

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchResponse]:  # noqa: N802
        """See file.proto."""
        channel = self._sandboxes.channel(request.sandbox_id)
        opened = channel.stream("fs.watch", path=path(request.path), recursive=request.recursive)
        async for event in events(opened):
            if event.get("ready"):
                yield pb.WatchResponse(type=pb.WatchResponse.TYPE_READY, path=request.path)
                continue
            kind = _WATCH_TYPES.get(str(event.get("type")), pb.WatchResponse.TYPE_OVERFLOW)
            new_path = guest_text(event, "new_path") if event.get("new_path") else ""
            yield pb.WatchResponse(type=kind, path=guest_text(event, "path"), new_path=new_path)


async def _feed(stream: CallStream, requests: AsyncIterator[pb.WriteFileRequest]) -> None:
    """Send the client's bytes to the guest.

    :raises InvalidSpec: a message after the first carries no data.
    """
    async for request in requests:
        if request.WhichOneof("message") != "data":
            raise InvalidSpec("only the first message may carry open")
        _IN.inc(len(request.data))
        await stream.send(Frame.DATA, request.data)
    await stream.send_eof()


async def _written(stream: CallStream, feeder: asyncio.Task[None]) -> pb.WriteFileResponse:
    """Return the response with the guest's byte count; fail as soon as either side fails."""

    async def result() -> int:
        while (frame := await stream.recv()) is not None:
            if frame[0] is Frame.RESULT:
                return guest_int(frame[1], "bytes")
        raise GuestUnreachable("the guest ended the write without a result")

    waiter = asyncio.create_task(result())
    try:
        await asyncio.wait({waiter, feeder}, return_when=asyncio.FIRST_COMPLETED)
        if feeder.done() and not feeder.cancelled() and (error := feeder.exception()) is not None and not waiter.done():
            raise error
        try:
            return pb.WriteFileResponse(written_bytes=await waiter)
        except AgentError:
            # Read and drop what the client still sends: a client whose write fails does not read the status.
            await asyncio.wait({feeder}, timeout=_DRAIN_TIMEOUT_S)
            raise
    finally:
        await cancel_and_wait(waiter)
