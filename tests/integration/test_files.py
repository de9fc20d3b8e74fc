"""FileService on the files of a real guest: contents, single files, rights, errors."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from sandboxd.v1 import file_pb2 as pb
from tests.support.client import MIB
from tests.support.daemon import refused, until
from tests.support.files import HOME, Files

pytestmark = pytest.mark.vm

NOT_FOUND, EXISTS, DENIED = (
    grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.PERMISSION_DENIED,
)  # fmt: skip
PRECONDITION, INVALID = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT
Open = pb.WriteFileRequest.Open
FILE, DIRECTORY, SYMLINK = pb.FileInfo.TYPE_FILE, pb.FileInfo.TYPE_DIRECTORY, pb.FileInfo.TYPE_SYMLINK


async def test_write_dispositions(files: Files) -> None:
    assert await files.write("a", b"hello ", b"", b"world") == 11  # relative: below the home directory
    assert await files.read(f"{HOME}/a") == b"hello world"
    assert await files.write("a", b"short") == 5
    assert await files.read("a") == b"short"
    assert await files.write("a", b"er", disposition=Open.DISPOSITION_APPEND) == 2
    assert await files.read("a") == b"shorter"
    await files.write("a", b"XY", disposition=Open.DISPOSITION_KEEP, offset=1)
    assert await files.read("a") == b"sXYrter"
    await files.write("a", b"end", disposition=Open.DISPOSITION_KEEP, offset=10)
    assert await files.read("a") == b"sXYrter\0\0\0end"
    with refused(EXISTS, "EEXIST"):
        await files.write("a", b"x", disposition=Open.DISPOSITION_CREATE_NEW)
    await files.write("new", disposition=Open.DISPOSITION_CREATE_NEW)
    for disposition in (Open.DISPOSITION_APPEND, Open.DISPOSITION_KEEP, Open.DISPOSITION_TRUNCATE):
        with refused(NOT_FOUND, "ENOENT"):
            await files.write("none", b"x", disposition=disposition, must_exist=True)
    assert await files.write("a", b"there", must_exist=True) == 5
    with refused(NOT_FOUND, "ENOENT"):
        await files.write("d/e/f", b"x")
    await files.write("d/e/f", b"x", make_parents=True)
    assert await files.read("d/e/f") == b"x"


async def test_read_ranges(files: Files) -> None:
    data = bytes(range(256)) * 1024
    await files.write("a", data)
    size = len(data)
    for offset, length in ((0, 0), (0, 1), (5, 10), (100_000, 70_000), (size - 3, 0), (size - 3, 10), (size, 0)):
        assert await files.read("a", offset=offset, length=length) == data[offset:][: length or None]
    assert await files.read("a", offset=1 << 40) == b""
    for wrong in ({"offset": -1}, {"length": -1}):
        with refused(INVALID, "INVALID_SPEC"):
            await files.read("a", **wrong)
    # Files of proc(5) have no size and can be read all the same.
    assert b"processor" in await files.read("/proc/cpuinfo")


async def test_modes_owners_and_rights(files: Files) -> None:
    await files.write("plain", b"")
    await files.write("mine", b"", mode=0o4751, user="sandbox")
    found = [await files.stat(name) for name in ("plain", "mine")]
    assert [(one.mode, one.uid, one.gid) for one in found] == [(0o644, 0, 0), (0o4751, 1000, 1000)]
    for call in (
        lambda: files.write("/etc/x", b"", user="sandbox"),
        lambda: files.write("/etc/passwd", b"", user="1000", disposition=Open.DISPOSITION_APPEND),
        lambda: files.write("/root/x", b"", user="sandbox"),
        lambda: files.read("/etc/shadow", user="sandbox"),
        lambda: files.call("MakeDirectory", path="/etc/d", user="sandbox"),
        lambda: files.call("MakeTemp", directory="/etc", user="sandbox"),
    ):
        with refused(DENIED, "EACCES"):
            await call()
    assert await files.read("/etc/shadow") != b""
    with refused(PRECONDITION, "USER_UNKNOWN"):
        await files.write("x", b"", user="nobody-of-this-name")
    # And the next call acts as root again.
    await files.write("/etc/x", b"")
    await files.call("Remove", path="/etc/x")
    with refused(INVALID, "INVALID_SPEC"):
        await files.write("x", b"", mode=0o10000)


async def test_single_files(files: Files) -> None:
    await files.call("MakeDirectory", path="d", mode=0o700, user="sandbox")
    made = await files.stat("d")
    assert (made.type, made.mode, made.uid) == (DIRECTORY, 0o700, 1000)
    with refused(EXISTS, "EEXIST"):
        await files.call("MakeDirectory", path="d")
    await files.call("MakeDirectory", path="d/e/f", parents=True)
    await files.call("MakeDirectory", path="d/e/f", parents=True)
    await files.write("d/a", b"0123456789")
    await files.call("Link", path="d/a", new_path="d/b")
    assert (await files.stat("d/b")).link_count == 2
    await files.call("Symlink", target="../d/a", new_path="d/l")
    link = await files.stat("d/l", no_follow=True)
    assert (link.type, link.link_target) == (SYMLINK, "../d/a")
    assert (await files.stat("d/l")).type == FILE
    assert (await files.call("ReadLink", path="d/l")).target == "../d/a"
    assert (await files.call("RealPath", path="d/./e/../l")).path == f"{HOME}/d/a"
    await files.call("Rename", path="d/b", new_path="d/c")
    await files.call("Truncate", path="d/c", size_bytes=4)
    assert await files.read("d/a") == b"0123"
    await files.call("Chmod", path="d/a", mode=0o600)
    await files.call("Chown", path="d/a", uid=7, gid=8)
    await files.call("Chown", path="d/a", gid=9)
    await files.call("Chown", path="d/l", uid=5, no_follow=True)
    times = [Timestamp(seconds=1_000_000_000 + number, nanos=number) for number in (1, 2)]
    await files.call("SetTimes", path="d/a", access_time=times[0], modify_time=times[1])
    now = await files.stat("d/a")
    assert (now.mode, now.uid, now.gid, now.size_bytes) == (0o600, 7, 9, 4)
    assert (now.access_time, now.modify_time) == (times[0], times[1])
    assert (await files.stat("d/l", no_follow=True)).uid == 5
    await files.call("SetTimes", path="d/a")
    assert (await files.stat("d/a")).modify_time.seconds > 1_700_000_000
    await files.call("Copy", path="d/a", new_path="d/copy")
    copied = await files.stat("d/copy")
    assert (await files.read("d/copy"), copied.mode, copied.uid) == (b"0123", 0o600, 7)
    for fields, mode in (({"make_directory": True}, 0o700), ({"prefix": "p-", "suffix": ".s"}, 0o600)):
        path = (await files.call("MakeTemp", user="sandbox", **fields)).path
        assert ((await files.stat(path)).mode, (await files.stat(path)).uid) == (mode, 1000)
        await files.call("Remove", path=path)
    assert path.startswith("/tmp/p-")
    assert path.endswith(".s")
    assert (await files.stat("/dev/null")).type == pb.FileInfo.TYPE_CHARACTER_DEVICE


async def test_errors_say_what_is_wrong(files: Files) -> None:
    await files.write("file", b"x")
    await files.call("MakeDirectory", path="full/inside", parents=True)
    await files.call("Symlink", target="loop", new_path="loop")
    cases: list[tuple[str, dict[str, Any], grpc.StatusCode, str]] = [
        ("Stat", {"path": "none"}, NOT_FOUND, "ENOENT"),
        ("Remove", {"path": "none"}, NOT_FOUND, "ENOENT"),
        ("Remove", {"path": "full"}, PRECONDITION, "ENOTEMPTY"),
        ("Remove", {"path": "/", "recursive": True}, INVALID, "INVALID_SPEC"),
        ("Stat", {"path": "file/x"}, PRECONDITION, "ENOTDIR"),
        ("Stat", {"path": "loop"}, PRECONDITION, "ELOOP"),
        ("Rename", {"path": "file", "new_path": "full"}, PRECONDITION, "EISDIR"),
        ("Rename", {"path": "full", "new_path": "file"}, PRECONDITION, "ENOTDIR"),
        ("Rename", {"path": "file", "new_path": "/tmp/file"}, PRECONDITION, "EXDEV"),
        ("Copy", {"path": "full", "new_path": "other"}, PRECONDITION, "EISDIR"),
        ("Copy", {"path": "full", "new_path": "full/inside/x", "recursive": True}, INVALID, "INVALID_SPEC"),
        ("Copy", {"path": "file", "new_path": "file"}, INVALID, "INVALID_SPEC"),
        ("Link", {"path": "file", "new_path": "full"}, EXISTS, "EEXIST"),
        ("Symlink", {"target": "x", "new_path": "file"}, EXISTS, "EEXIST"),
        ("ReadLink", {"path": "file"}, INVALID, "EINVAL"),
        ("RealPath", {"path": "none/x"}, NOT_FOUND, "ENOENT"),
        ("Truncate", {"path": "full", "size_bytes": 1}, PRECONDITION, "EISDIR"),
        ("Truncate", {"path": "file", "size_bytes": -1}, INVALID, "INVALID_SPEC"),
        ("Chmod", {"path": "file", "mode": -1}, INVALID, "INVALID_SPEC"),
        ("Chown", {"path": "file", "uid": -1}, INVALID, "INVALID_SPEC"),
        ("SetTimes", {"path": "file", "modify_time": Timestamp(seconds=1 << 62)}, INVALID, "INVALID_SPEC"),
        ("SetTimes", {"path": "file", "access_time": Timestamp(nanos=-5)}, INVALID, "INVALID_SPEC"),
        ("MakeTemp", {"directory": "none"}, NOT_FOUND, "ENOENT"),
        ("MakeTemp", {"prefix": "a/b"}, INVALID, "INVALID_SPEC"),
        ("MakeTemp", {"prefix": "x" * 100_000}, INVALID, "ENAMETOOLONG"),
        ("MakeDirectory", {"path": "/proc/x"}, NOT_FOUND, "ENOENT"),
    ]
    cases += [
        (name, {"path": path}, INVALID, "INVALID_SPEC")
        for name in ("Stat", "Remove", "MakeDirectory", "RealPath")
        for path in ("", "a\0b", "x" * 100_000)
    ]
    for name, fields, code, why in cases:
        with refused(code, why):
            await files.call(name, **fields)
    assert await files.read("file") == b"x"
    await files.sh(f"mkfifo {HOME}/pipe")
    more: list[tuple[Callable[[], Awaitable[Any]], grpc.StatusCode, str]] = [
        (lambda: files.read("full"), PRECONDITION, "EISDIR"),
        (lambda: files.read("none"), NOT_FOUND, "ENOENT"),
        (lambda: files.read("/dev/zero"), PRECONDITION, "NOT_REGULAR"),
        (lambda: files.read("pipe"), PRECONDITION, "NOT_REGULAR"),
        (lambda: files.call("Copy", path="pipe", new_path="copy"), PRECONDITION, "NOT_REGULAR"),
        (lambda: files.call("Copy", path="file", new_path="pipe"), NOT_FOUND, "ENXIO"),
        (lambda: files.call("Copy", path="file", new_path="/dev/null"), PRECONDITION, "NOT_REGULAR"),
        (lambda: files.write("full", b"x"), PRECONDITION, "EISDIR"),
        (lambda: files.write("file/x", b"x", make_parents=True), EXISTS, "EEXIST"),
        (lambda: files.write("x" * 300, b"x"), INVALID, "ENAMETOOLONG"),
        (lambda: files.write("/sys/kernel/x", b"x"), DENIED, "EACCES"),
    ]
    for call, code, why in more:
        with refused(code, why):
            await call()


async def test_large_files_keep_their_digest_both_ways(files: Files) -> None:
    piece = hashlib.sha256(b"seed").digest() * (MIB // 32)
    pieces = [bytes([number]) + piece[1:] for number in range(64)]
    assert await files.write("big", *pieces) == 64 * MIB
    digest = hashlib.sha256(b"".join(pieces)).hexdigest()
    assert (await files.client.run(files.id, "sha256sum", "big")).stdout.split()[0].decode() == digest
    assert hashlib.sha256(await files.read("big")).hexdigest() == digest


async def test_a_write_that_is_abandoned_ends(files: Files) -> None:
    async def half() -> AsyncIterator[pb.WriteFileRequest]:
        yield pb.WriteFileRequest(open=Open(sandbox_id=files.id, path="half"))
        yield pb.WriteFileRequest(data=b"x" * MIB)
        await asyncio.sleep(60)

    call = files.client.files.WriteFile(half())

    async def has(size: int) -> bool:
        try:
            return (await files.stat("half")).size_bytes == size
        except grpc.aio.AioRpcError:
            return False

    await until(lambda: has(MIB))
    call.cancel()

    async def open_files() -> int:
        found = await files.client.run(files.id, "sh", "-c", f"ls -l /proc/1/fd | grep -c {HOME}", user="root")
        return int(found.stdout)

    async def closed() -> bool:
        return await open_files() == 0

    await until(closed)
    assert await files.write("half", b"all of it") == 9
    assert await files.read("half") == b"all of it"
