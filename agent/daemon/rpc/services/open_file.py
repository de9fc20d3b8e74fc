"""Serve the call OpenFile of FileService: each request becomes one operation on a file that is open in the guest."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from agent.common.errors import GuestUnreachable, InvalidSpec
from agent.common.telemetry import STREAM_BYTES
from agent.daemon.guestlink.stream import CallStream
from agent.daemon.rpc.convert.file_messages import count, info, mode_bits, nanoseconds, path
from agent.daemon.rpc.convert.guest_values import guest_dict, guest_int, guest_text
from guest.wire import Frame
from sandboxd.v1 import file_pb2 as pb

_OUT = STREAM_BYTES.labels("file", "from_guest")
_IN = STREAM_BYTES.labels("file", "to_guest")
_MAX_IO_BYTES = 1 << 20


def open_params(opened: pb.OpenFileRequest.Open) -> dict[str, object]:
    """Return the parameters of the guest's operation fs.open.

    :raises InvalidSpec: the path or the mode is not valid.
    """
    return {
        "path": path(opened.path), "read": opened.read, "write": opened.write, "append": opened.append,
        "truncate": opened.truncate, "create": opened.create, "create_new": opened.create_new,
        "mode": mode_bits(opened.mode if opened.HasField("mode") else 0o644), "user": opened.user or None,
    }  # fmt: skip


async def serve(stream: CallStream, requests: AsyncIterator[pb.OpenFileRequest]) -> AsyncIterator[pb.OpenFileResponse]:
    """Yield the response to the open, then one for each request.

    :raises InvalidSpec: a request is malformed; the call ends.
    :raises AgentError: the file cannot be opened.
    """
    yield pb.OpenFileResponse(info=info(guest_dict(await _answer(stream), "info")))
    async for request in requests:
        kind = request.WhichOneof("message")
        if kind == "write":
            await _write(stream, request.write)
        else:
            await stream.send_json(_operation(request, kind))
        answer = await _answer(stream)
        if "error" in answer:
            error = guest_dict(answer, "error")
            reason, message = guest_text(error, "errno"), guest_text(error, "message")
            yield pb.OpenFileResponse(error=pb.OpenFileResponse.Error(reason=reason, message=message))
        else:
            yield await _response(stream, kind, answer)
    await stream.send_eof()


def _operation(request: pb.OpenFileRequest, kind: str | None) -> dict[str, object]:
    match kind:
        case "read":
            if not 1 <= request.read.length <= _MAX_IO_BYTES:
                raise InvalidSpec(f"length is {request.read.length}; it must be from 1 to {_MAX_IO_BYTES}")
            return {"do": "read", "size": request.read.length}
        case "seek":
            return {"do": "seek", "offset": request.seek.offset, "whence": request.seek.whence}
        case "truncate":
            return {"do": "truncate", "size": count(request.truncate.size_bytes, "size_bytes")}
        case "sync":
            return {"do": "sync", "data_only": request.sync.data_only}
        case "lock":
            return {"do": "lock", "exclusive": request.lock.exclusive}
        case "set_times":
            times = request.set_times
            return {
                "do": "utime",
                "atime_ns": nanoseconds(times.access_time) if times.HasField("access_time") else None,
                "mtime_ns": nanoseconds(times.modify_time) if times.HasField("modify_time") else None,
            }
        case "stat" | "unlock":
            return {"do": kind}
    raise InvalidSpec("each request after the first carries one operation on the open file")


async def _write(stream: CallStream, data: bytes) -> None:
    if len(data) > _MAX_IO_BYTES:
        raise InvalidSpec(
            f"a write of {len(data)} bytes is too large; send at most {_MAX_IO_BYTES} bytes in one request"
        )
    _IN.inc(len(data))
    await stream.send_json({"do": "write", "size": len(data)})
    await stream.send(Frame.DATA, data)


async def _answer(stream: CallStream) -> dict[str, Any]:
    frame = await stream.recv()
    if frame is None or frame[0] is not Frame.EVENT:
        raise GuestUnreachable("the guest closed an open file without being asked", reason="GUEST_MALFORMED")
    value: dict[str, Any] = frame[1]
    return value


async def _response(stream: CallStream, kind: str | None, answer: dict[str, Any]) -> pb.OpenFileResponse:
    match kind:
        case "read":
            return pb.OpenFileResponse(data=await _data(stream, guest_int(answer, "size", 0, _MAX_IO_BYTES)))
        case "write":
            return pb.OpenFileResponse(written_bytes=guest_int(answer, "written", 0, _MAX_IO_BYTES))
        case "seek":
            return pb.OpenFileResponse(position=guest_int(answer, "position"))
        case "stat":
            return pb.OpenFileResponse(info=info(answer))
    return pb.OpenFileResponse(done=pb.OpenFileResponse.Done())


async def _data(stream: CallStream, size: int) -> bytes:
    pieces = []
    while size:
        frame = await stream.recv(size)
        if frame is None or frame[0] is not Frame.DATA:
            raise GuestUnreachable(
                "the guest did not send the bytes that it reported as read", reason="GUEST_MALFORMED"
            )
        pieces.append(frame[1])
        size -= len(frame[1])
    _OUT.inc(sum(map(len, pieces)))
    return b"".join(pieces)
