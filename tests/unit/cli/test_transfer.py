"""`sandboxctl cp` out of a hostile sandbox, and what its parts promise."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from agent.cli.errors import CliError
from agent.cli.transfer.download import download
from agent.cli.transfer.entry import Entry, Kind, copy_name, local_entry
from agent.cli.transfer.guest_files import GuestFiles
from agent.cli.transfer.guest_shell import escaped
from agent.cli.transfer.host_tree import HostTree, names_below
from agent.cli.transfer.progress import Transfer, WorkerPool
from agent.cli.transfer.upload import upload
from agent.common.api_client import api_over
from sandboxd.v1 import file_pb2 as pb
from sandboxd.v1 import file_pb2_grpc
from tests.support import leaks

ID = "sbx-0123456789abcdef"
FILE, FOLDER, LINK, OTHER = (
    pb.FileInfo.TYPE_FILE, pb.FileInfo.TYPE_DIRECTORY, pb.FileInfo.TYPE_SYMLINK, pb.FileInfo.TYPE_OTHER,
)  # fmt: skip


def info(path: str, kind: Any = FILE, **fields: Any) -> pb.FileInfo:
    return pb.FileInfo(**{"path": path, "type": kind, "mode": 0o644, **fields})


@dataclass
class HostileFiles(file_pb2_grpc.FileServiceServicer):
    """A FileService that says whatever a test wants."""

    root: pb.FileInfo = field(default_factory=lambda: info("/src", FOLDER, mode=0o755))
    listing: list[pb.FileInfo] = field(default_factory=list)
    data: bytes = b"evil"
    read_paths: list[str] = field(default_factory=list)

    async def Stat(self, request: pb.StatRequest, context: Any) -> pb.FileInfo:  # noqa: N802
        return self.root

    async def Walk(self, request: pb.WalkRequest, context: Any) -> AsyncIterator[pb.WalkResponse]:  # noqa: N802
        yield pb.WalkResponse(entries=[self.root, *self.listing])

    async def ReadFile(self, request: pb.ReadFileRequest, context: Any) -> AsyncIterator[pb.ReadFileResponse]:  # noqa: N802
        self.read_paths.append(request.path)
        yield pb.ReadFileResponse(data=self.data)

    async def WriteFile(self, request_iterator: Any, context: Any) -> pb.WriteFileResponse:  # noqa: N802
        await anext(request_iterator)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the disk is full")
        raise AssertionError


@pytest.fixture
def place() -> Iterator[Path]:
    path = leaks.make_directory()
    (path / "target").mkdir()
    (path / "outside").mkdir()
    yield path
    for folder, _, _ in os.walk(path):  # a user without root cannot empty a copied folder that is read-only
        os.chmod(folder, 0o755)
    shutil.rmtree(path)


@pytest.fixture
def service() -> HostileFiles:
    return HostileFiles()  # type: ignore[abstract]  # the other calls answer UNIMPLEMENTED


@pytest.fixture
async def files(place: Path, service: HostileFiles) -> AsyncIterator[GuestFiles]:
    server = grpc.aio.server()
    file_pb2_grpc.add_FileServiceServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{place}/sock")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{place}/sock") as channel:
        yield GuestFiles(api_over(channel), ID)
    await server.stop(None)


@pytest.mark.parametrize(
    "listing",
    [
        [info("/etc/x")],
        [info("/src/../x")],
        [info("/src/a/../../x")],
        [info("/src//x")],
        [info("/src/.")],
        [info("/src/")],
        [info("/srcx")],
        [info("x")],
        [info("/src/", path_bytes=b"/src/../\xff")],
        [info("/src/no-such-folder/x")],
        [info("/src/l", LINK, link_target="../../outside"), info("/src/l/x")],
        [info("/src/l", LINK, link_target="../../outside"), info("/src/l", FOLDER), info("/src/l/x")],
        [info("/src/d", FOLDER), info("/src/d/l", LINK, link_target="../../../outside"), info("/src/d/l/x")],
        [info("/src/d", FOLDER), info("/src/d", LINK, link_target="../../outside"), info("/src/d/x")],
    ],
)
async def test_a_hostile_listing_writes_nothing_outside(
    files: GuestFiles, service: HostileFiles, place: Path, listing: list[pb.FileInfo]
) -> None:
    service.listing = listing
    with pytest.raises((CliError, OSError)):
        await download(files, Transfer(), b"/src", str(place / "target"), follow=False)
    assert list((place / "outside").iterdir()) == []
    assert sorted(entry.name for entry in os.scandir(place)) == ["outside", "sock", "target"]
    # A name that is both a folder and a link is one of the two here; what is in it is below the target in either case.
    assert all(path.parent.resolve().is_relative_to(place / "target") for path in (place / "target").rglob("x"))


async def test_a_file_does_not_go_through_a_link_of_the_same_name(
    files: GuestFiles, service: HostileFiles, place: Path
) -> None:
    (place / "outside" / "victim").write_text("untouched")
    service.listing = [info("/src/x", LINK, link_target=str(place / "outside" / "victim")), info("/src/x")]
    await download(files, Transfer(), b"/src", str(place / "target"), follow=False)
    assert (place / "outside" / "victim").read_text() == "untouched"
    assert not (place / "target" / "src" / "x").is_symlink()


async def test_a_link_that_was_in_the_target_is_not_followed(
    files: GuestFiles, service: HostileFiles, place: Path
) -> None:
    (place / "target" / "src").symlink_to(place / "outside")
    service.listing = [info("/src/x")]
    with pytest.raises(CliError, match="not a directory here"):
        await download(files, Transfer(), b"/src", str(place / "target"), follow=False)
    assert list((place / "outside").iterdir()) == []


async def test_set_user_id_does_not_come_out(files: GuestFiles, service: HostileFiles, place: Path) -> None:
    service.root = info("/src", FOLDER, mode=0o7777)
    service.listing = [info("/src/x", mode=0o6755)]
    await download(files, Transfer(), b"/src", str(place / "target"), follow=False)
    assert stat.S_IMODE((place / "target" / "src").stat().st_mode) == 0o777
    assert stat.S_IMODE((place / "target" / "src" / "x").stat().st_mode) == 0o755


async def test_folders_that_may_not_be_written_are_filled_all_the_same(
    files: GuestFiles, service: HostileFiles, place: Path
) -> None:
    service.listing = [info("/src/d", FOLDER, mode=0o555, modify_time={"seconds": 1}), info("/src/d/x", mode=0o400)]
    service.listing[1].modify_time.seconds = -(1 << 40)
    transfer = Transfer()
    await download(files, transfer, b"/src", str(place / "target"), follow=False)
    made = place / "target" / "src" / "d"
    assert (stat.S_IMODE(made.stat().st_mode), made.stat().st_mtime) == (0o555, 1)
    assert (made / "x").read_bytes() == b"evil"
    assert (transfer.files, transfer.directories, transfer.bytes) == (1, 2, 4)


async def test_devices_are_left_out_and_named(files: GuestFiles, service: HostileFiles, place: Path) -> None:
    service.listing = [info("/src/\x1bdev", OTHER), info("/src/x")]
    transfer = Transfer()
    await download(files, transfer, b"/src", str(place / "target"), follow=False)
    assert transfer.skipped == ["/src/\ufffddev"]
    assert service.read_paths == ["/src/x"]


@pytest.mark.parametrize(
    ("target", "copy"),
    [("target", "target/src"), ("target/new", "target/new"), ("target/", "target/src"), ("target/new/", "target/new")],
)
async def test_where_a_folder_goes(
    files: GuestFiles, service: HostileFiles, place: Path, target: str, copy: str
) -> None:
    service.listing = [info("/src/x")]
    await download(files, Transfer(), b"/src", f"{place}/{target}", follow=False)
    assert (place / copy / "x").exists()


async def test_where_a_file_goes(files: GuestFiles, service: HostileFiles, place: Path) -> None:
    service.root = info("/src/f", size_bytes=4)
    for target, copy in (("target", "target/f"), ("target/new", "target/new")):
        await download(files, Transfer(), b"/src/f", f"{place}/{target}", follow=False)
        assert (place / copy).read_bytes() == b"evil"
    for target in ("nowhere/f", "target/none/"):
        with pytest.raises(CliError, match="no such directory"):
            await download(files, Transfer(), b"/src/f", f"{place}/{target}", follow=False)
    service.root = info("/src", FOLDER)
    with pytest.raises(CliError, match="not a directory"):
        await download(files, Transfer(), b"/src", f"{place}/target/f", follow=False)


async def test_contents_alone(files: GuestFiles, service: HostileFiles, place: Path) -> None:
    service.root = info("/src/.", FOLDER)
    service.listing = [info("/src/./x")]
    await download(files, Transfer(), b"/src/.", str(place / "target"), follow=False)
    assert [entry.name for entry in (place / "target").iterdir()] == ["x"]


async def test_a_full_disk_in_the_guest_ends_an_upload(files: GuestFiles, place: Path) -> None:
    (place / "big").write_bytes(bytes(8 << 20))
    with pytest.raises((grpc.aio.AioRpcError, CliError)) as caught:
        await upload(files, Transfer(), str(place / "big"), "/", follow=False)
    if isinstance(caught.value, CliError):  # grpc.aio lost the daemon's status
        assert (caught.value.reason, "disk full" in caught.value.message) == ("UPLOAD_CUT_OFF", True)
    else:
        assert isinstance(caught.value, grpc.aio.AioRpcError)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_missing_local_file_is_an_os_error(files: GuestFiles, place: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await upload(files, Transfer(), str(place / "none"), "/", follow=False)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_names_below() -> None:
    assert names_below(b"/a", b"/a/b/\xff") == (b"b", b"\xff")
    assert names_below(b"/", b"/a") == (b"a",)
    for path in (b"/a", b"/a/", b"/b/c", b"/a/./b", b"/a/..", b"/a//b", b"/a/b\0c", b""):
        with pytest.raises(CliError) as caught:
            names_below(b"/a", path)
        assert caught.value.reason == "HOSTILE_LISTING"


def test_a_tree_replaces_what_is_no_regular_file_without_opening_it(place: Path) -> None:
    os.mkfifo(place / "target" / "pipe")
    tree = HostTree(str(place / "target"))
    with tree.new_file((b"pipe",)) as fd:
        os.write(fd, b"x")
    assert (place / "target" / "pipe").read_bytes() == b"x"
    tree.make_directory((b"d",))
    with pytest.raises(IsADirectoryError), tree.new_file((b"d",)):
        pass
    with pytest.raises(IsADirectoryError):
        tree.make_link((b"d",), b"x", 0)


def test_a_tree_makes_a_folder_once_and_leaves_no_descriptor(place: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    tree = HostTree(str(place / "target"))
    assert tree.make_directory((b"d",)) is True
    assert tree.make_directory((b"d",)) is False
    tree.make_link((b"l",), b"d", 0)
    with pytest.raises(CliError):
        tree.make_directory((b"l", b"x"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_local_entries(place: Path) -> None:
    (place / "target" / "l").symlink_to("\udcff")
    entry = local_entry(os.fsencode(place / "target" / "l"), follow=False)
    assert (entry.kind, entry.target) == (Kind.LINK, b"\xff")
    assert isinstance(entry, Entry)
    assert local_entry(os.fsencode(place), follow=False).kind is Kind.DIRECTORY


async def test_the_first_error_of_a_pool_is_raised_as_itself() -> None:
    async def fail() -> None:
        raise CliError("first")

    async def fill() -> None:
        async with WorkerPool() as pool:
            for _ in range(20):
                await pool.start(fail)

    with pytest.raises(CliError, match="first"):
        await fill()


@pytest.mark.parametrize(
    ("path", "name"), [("/a/b", b"b"), ("b/", b"b"), (".", b""), ("a/.", b""), ("..", b""), ("/", b""), ("a/..", b"")]
)
def test_own_names(path: str, name: bytes) -> None:
    assert copy_name(path) == name


def test_escaped_words_are_what_printf_makes_of_them() -> None:
    word = bytes(range(1, 256)) + b"\n\n"
    done = subprocess.run(["sh", "-c", 'printf %b "$1"', "sh", escaped(word)], capture_output=True, check=True)
    assert done.stdout == word
