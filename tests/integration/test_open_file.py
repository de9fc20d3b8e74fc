"""FileService's open files, and files as a user, on a real guest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from agent.common.api_client import opened
from sandboxd.v1 import file_pb2 as pb
from tests.support.client import MIB
from tests.support.daemon import refused
from tests.support.files import HOME, Files

pytestmark = pytest.mark.vm

Request = pb.OpenFileRequest
_OWNERS_ALONE = ("Chmod", "Chown", "SetTimes")
DENIED, INVALID = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT


class Opened:
    """One call of OpenFile."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def ask(self, **request: Any) -> pb.OpenFileResponse:
        await self.call.write(Request(**request))
        response: pb.OpenFileResponse = await self.call.read()
        return response

    async def read(self, length: int = MIB) -> bytes:
        return (await self.ask(read=Request.Read(length=length))).data


@asynccontextmanager
async def open_file(files: Files, path: str, **how: Any) -> AsyncIterator[Opened]:
    made = Opened(opened(files.client.files.OpenFile))
    try:
        response = await made.ask(open=Request.Open(sandbox_id=files.id, path=path, **how))
        assert response.HasField("info"), response
        yield made
    finally:
        made.call.cancel()


async def test_position_size_and_facts(files: Files) -> None:
    async with open_file(files, "a", read=True, write=True, create=True, mode=0o640) as file:
        assert (await file.ask(write=b"hello world")).written_bytes == 11
        assert (await file.ask(seek=Request.Seek(offset=-5, whence=Request.Seek.WHENCE_END))).position == 6
        assert await file.read() == b"world"
        assert await file.read() == b""
        assert (await file.ask(seek=Request.Seek(offset=2))).position == 2
        assert await file.read(3) == b"llo"
        assert (await file.ask(truncate=Request.Truncate(size_bytes=4))).HasField("done")
        assert (await file.ask(stat=Request.Stat())).info.size_bytes == 4
        assert (await file.ask(stat=Request.Stat())).info.mode == 0o640
        for sync in (Request.Sync(), Request.Sync(data_only=True)):
            assert (await file.ask(sync=sync)).HasField("done")
        times = Request.SetTimes(access_time=Timestamp(seconds=5), modify_time=Timestamp(seconds=7))
        await file.ask(set_times=times)
        assert (await file.ask(stat=Request.Stat())).info.modify_time.seconds == 7
    assert await files.read("a") == b"hell"


async def test_large_reads_and_writes(files: Files) -> None:
    data = bytes(range(256)) * 4096
    async with open_file(files, "large", read=True, write=True, create=True) as file:
        for _ in range(3):
            assert (await file.ask(write=data)).written_bytes == MIB
        await file.ask(seek=Request.Seek())
        read = b""
        while piece := await file.read():
            read += piece
        assert read == data * 3
        with refused(INVALID, "INVALID_SPEC"):
            await file.ask(write=bytes(MIB + 1))


async def test_how_a_file_is_opened(files: Files) -> None:
    await files.write("a", b"one")
    async with open_file(files, "a", append=True) as file:
        await file.ask(seek=Request.Seek())
        await file.ask(write=b"+two")
    assert await files.read("a") == b"one+two"
    async with open_file(files, "a", write=True, truncate=True) as file:
        error = (await file.ask(read=Request.Read(length=1))).error
        assert error.reason == "EBADF"  # and the file is open still
        assert (await file.ask(stat=Request.Stat())).info.size_bytes == 0
    for how, code, why in (
        ({"read": True, "path": "none"}, grpc.StatusCode.NOT_FOUND, "ENOENT"),
        ({"write": True, "create_new": True, "path": "a"}, grpc.StatusCode.ALREADY_EXISTS, "EEXIST"),
        ({"path": "a"}, INVALID, "INVALID_SPEC"),
        ({"read": True, "create": True, "path": "a"}, INVALID, "INVALID_SPEC"),
        ({"write": True, "path": "/tmp"}, grpc.StatusCode.FAILED_PRECONDITION, "EISDIR"),
        ({"read": True, "path": "/dev/zero"}, grpc.StatusCode.FAILED_PRECONDITION, "NOT_REGULAR"),
    ):  # fmt: skip
        with refused(code, why):
            async with open_file(files, **how):
                pass
    async with open_file(files, "/tmp", read=True) as directory:
        assert (await directory.ask(stat=Request.Stat())).info.type == pb.FileInfo.TYPE_DIRECTORY
        assert (await directory.ask(read=Request.Read(length=1))).error.reason == "EISDIR"


async def test_locks_wait_and_end_with_their_file(files: Files) -> None:
    async with open_file(files, "l", write=True, create=True) as one:
        async with open_file(files, "l", read=True) as two:
            await one.ask(lock=Request.Lock(exclusive=True))
            waiting = asyncio.create_task(two.ask(lock=Request.Lock()))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            result = await files.client.run(files.id, "flock", "-n", f"{HOME}/l", "true", user="root")
            assert result.code == 1  # programs see it, too
            await one.ask(unlock=Request.Unlock())
            assert (await waiting).HasField("done")
            again = asyncio.create_task(one.ask(lock=Request.Lock(exclusive=True)))
            await asyncio.sleep(0.1)
            assert not again.done()
        assert (await again).HasField("done")


async def test_files_as_a_user(files: Files) -> None:
    await files.write("mine", b"x", user="sandbox")
    assert (await files.stat("mine", user="sandbox")).uid == 1000
    await files.call("Copy", path="mine", new_path="copied", user="sandbox")
    assert (await files.stat("copied")).uid == 1000
    await files.sh(f"mkdir -m 700 {HOME}/secret && echo x > {HOME}/secret/file && chmod 600 {HOME}/secret/file")
    secret = f"{HOME}/secret/file"
    for name, fields in (
        ("Stat", {"path": secret}), ("Remove", {"path": f"{HOME}/secret", "recursive": True}),
        ("Rename", {"path": secret, "new_path": "x"}), ("Copy", {"path": secret, "new_path": "x"}),
        ("Link", {"path": secret, "new_path": "x"}), ("Symlink", {"target": "x", "new_path": "/etc/x"}),
        ("ReadLink", {"path": secret}), ("RealPath", {"path": secret}),
        ("Chmod", {"path": "/etc/passwd", "mode": 0o666}), ("SetTimes", {"path": "/etc/passwd"}),
        ("Chown", {"path": "/etc/passwd", "uid": 1000}), ("Truncate", {"path": "/etc/passwd", "size_bytes": 0}),
        ("MakeDirectory", {"path": "/etc/new"}), ("MakeTemp", {"directory": "/etc"}),
    ):  # fmt: skip
        with refused(DENIED, "EPERM" if name in _OWNERS_ALONE else "EACCES"):
            await files.call(name, **fields, user="sandbox")
    with refused(DENIED, "EACCES"):
        async for _ in files.client.files.ListDirectory(
            pb.ListDirectoryRequest(sandbox_id=files.id, path=f"{HOME}/secret", user="sandbox")
        ):
            pass
    walked = [
        info.path
        async for page in files.client.files.Walk(pb.WalkRequest(sandbox_id=files.id, path=HOME, user="sandbox"))
        for info in page.entries
    ]
    assert f"{HOME}/secret" in walked  # what may not be entered is not an error
    assert secret not in walked
    with refused(DENIED, "EACCES"):
        async with open_file(files, "/etc/shadow", read=True, user="sandbox"):
            pass
