"""Directories, trees, globs and watches of the guest."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.common.errors import AgentError, InvalidSpec, InvalidState, NotFound
from agent.daemon.guestlink.channel import Channel
from agent.daemon.guestlink.stream import CallStream
from guest.wire import Frame
from tests.support.guest_child import MIB, collect

pytestmark = pytest.mark.timeout(30)


async def entries(channel: Channel, op: str, **fields: Any) -> list[str]:
    _, _, events = await collect(channel, op, **fields)
    return [str(entry["path"]) for event in events for entry in event["entries"]]


def make_deep(root: Path, depth: int) -> None:
    """Makes nested directories, deeper than any path may be long."""
    fd = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for path in ("a/b/c.py", "a/b/d.txt", "a/.hidden/e.py", "f.py", "z/g.py", "new\nline.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    return tmp_path


async def test_list_has_every_entry_once(channel: Channel, tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"f{number}").touch()
    found = await entries(channel, "fs.list", path=f"{tmp_path}/")
    assert sorted(found) == sorted(f"{tmp_path}/f{number}" for number in range(1000))
    with pytest.raises(InvalidState):
        await entries(channel, "fs.list", path=str(tmp_path / "f1"))


async def test_walk(channel: Channel, tree: Path) -> None:
    names = [path.removeprefix(str(tree)) for path in await entries(channel, "fs.walk", path=str(tree))]
    assert names == ["", "/a", "/a/.hidden", "/a/.hidden/e.py", "/a/b", "/a/b/c.py", "/a/b/d.txt", "/a/loop", "/f.py",
                     "/new\nline.py", "/z", "/z/g.py"]  # fmt: skip
    names = [path.removeprefix(str(tree)) for path in await entries(channel, "fs.walk", path=str(tree), max_depth=1)]
    assert names == ["", "/a", "/f.py", "/new\nline.py", "/z"]
    followed = await entries(channel, "fs.walk", path=str(tree), follow=True)
    assert len(followed) == 12
    with pytest.raises(NotFound):
        await entries(channel, "fs.walk", path=str(tree / "none"))


async def test_a_tree_that_is_deeper_than_a_path_is_long(
    channel: Channel, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "deep").mkdir()
    make_deep(tmp_path / "deep", 200)
    assert len(await entries(channel, "fs.walk", path=str(tmp_path / "deep"))) == 201
    await channel.call("fs.remove", path=str(tmp_path / "deep"), recursive=True)
    (tmp_path / "deeper").mkdir()
    make_deep(tmp_path / "deeper", 3000)
    request.addfinalizer(lambda: subprocess.run(["rm", "-rf", tmp_path / "deeper"], check=True))
    assert len(await entries(channel, "fs.walk", path=str(tmp_path / "deeper"))) <= 300
    with pytest.raises(InvalidState, match="nested more than"):
        await channel.call("fs.remove", path=str(tmp_path / "deeper"), recursive=True)
    assert await channel.call("test.open") == {}
    assert (await collect(channel, "test.echo", b"x"))[0]["bytes"] == 1


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.py", ["f.py", "new\nline.py"]),
        ("**/*.py", ["a/b/c.py", "f.py", "new\nline.py", "z/g.py"]),
        ("a/**", ["a", "a/b", "a/b/c.py", "a/b/d.txt", "a/loop"]),
        ("a/b/c.py", ["a/b/c.py"]),
        ("[az]/?.py", ["z/g.py"]),
        ("[!a]", ["z"]),
        ("none/*", []),
    ],
)
async def test_glob(channel: Channel, tree: Path, pattern: str, found: list[str]) -> None:
    assert await entries(channel, "fs.glob", root=str(tree), pattern=pattern) == [f"{tree}/{name}" for name in found]


async def test_glob_options(channel: Channel, tree: Path) -> None:
    found = await entries(channel, "fs.glob", root="/", pattern=f"{tree}/a/**/*.py", include_hidden=True)
    assert found == [f"{tree}/a/.hidden/e.py", f"{tree}/a/b/c.py"]
    found = await entries(channel, "fs.glob", root=str(tree), pattern="**", exclude_directories=True)
    assert f"{tree}/a" not in found
    assert f"{tree}/a/b/c.py" in found
    with pytest.raises(InvalidSpec):
        await entries(channel, "fs.glob", root=str(tree), pattern="../*")


# -- remove and copy ---------------------------------------------------------------------------------------------------


async def test_remove(channel: Channel, tree: Path) -> None:
    with pytest.raises(InvalidState) as caught:
        await channel.call("fs.remove", path=str(tree / "a"))
    assert caught.value.reason == "ENOTEMPTY"
    (tree / "outside").mkdir()
    (tree / "outside" / "keep").touch()
    (tree / "a" / "link").symlink_to(tree / "outside")
    await channel.call("fs.remove", path=f"{tree}/a/", recursive=True)
    assert not (tree / "a").exists()
    assert (tree / "outside" / "keep").exists()
    (tree / "top").symlink_to(tree / "outside")
    await channel.call("fs.remove", path=str(tree / "top"), recursive=True)
    assert (tree / "outside" / "keep").exists()
    for path in ("/", "//", "/.", "/.."):
        with pytest.raises(InvalidSpec):
            await channel.call("fs.remove", path=path, recursive=True)


async def test_remove_while_names_change_into_links(channel: Channel, tmp_path: Path) -> None:
    """Directories that become links to outside while they are removed: nothing outside may go."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").touch()
    for round_ in range(10):
        root = tmp_path / f"tree{round_}"
        for number in range(40):
            (root / f"d{number}" / "e").mkdir(parents=True)

        def swap(root: Path = root) -> None:
            for number in reversed(range(40)):
                try:
                    (root / f"d{number}").rename(tmp_path / f"gone{root.name}{number}")
                    (root / f"d{number}").symlink_to(outside)
                except OSError:
                    return

        removing = asyncio.create_task(channel.call("fs.remove", path=str(root), recursive=True))
        await asyncio.to_thread(swap)
        await asyncio.gather(removing, return_exceptions=True)
        assert (outside / "keep").exists()


async def test_copy_keeps_contents_holes_modes_and_links(channel: Channel, tree: Path, tmp_path: Path) -> None:
    with (tree / "a" / "sparse").open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(32 * MIB)
        file.write(b"middle")
    os.chmod(tree / "a" / "b", 0o2750)
    os.utime(tree / "a" / "b" / "c.py", ns=(1, 2))
    target = tree / "copy"
    await channel.call("fs.copy", path=str(tree / "a"), new_path=str(target), recursive=True)
    assert (target / "b" / "c.py").read_text() == "a/b/c.py"
    assert (target / "b" / "c.py").stat().st_mtime_ns == 2
    assert (target / "b").stat().st_mode == (tree / "a" / "b").stat().st_mode
    assert os.readlink(target / "loop") == str(tree)
    facts = (target / "sparse").stat()
    assert (facts.st_size, facts.st_blocks < 1000) == (64 * MIB, True)
    assert (target / "sparse").read_bytes() == (tree / "a" / "sparse").read_bytes()


async def test_copy_refuses_what_makes_no_sense(channel: Channel, tree: Path) -> None:
    for path, new_path, recursive in (
        (tree, tree / "x", True), (tree, tree, True), (tree / "a", tree / "x", False),
        (tree / "f.py", tree / "a", False), (tree / "none", tree / "x", True),
    ):  # fmt: skip
        with pytest.raises(AgentError):
            await channel.call("fs.copy", path=str(path), new_path=str(new_path), recursive=recursive)
    assert not (tree / "x").exists()


async def test_copy_over_a_longer_file(channel: Channel, tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"x" * 100_000)
    with (tmp_path / "new").open("wb") as file:
        file.truncate(50_000)
        file.write(b"begin")
    await channel.call("fs.copy", path=str(tmp_path / "new"), new_path=str(tmp_path / "old"))
    assert (tmp_path / "old").read_bytes() == (tmp_path / "new").read_bytes() == b"begin" + bytes(49_995)


@pytest.mark.parametrize("kind", ["same", "hard link", "symbolic link"])
async def test_copy_of_a_file_onto_itself_keeps_it(channel: Channel, tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "f", tmp_path / "g"
    path.write_text("precious")
    if kind == "hard link":
        other.hardlink_to(path)
    elif kind == "symbolic link":
        other.symlink_to("f")
    with pytest.raises(InvalidSpec, match="same file"):
        await channel.call("fs.copy", path=str(path), new_path=str(path if kind == "same" else other))
    assert path.read_text() == "precious"


async def test_copy_to_another_kind_of_file_system(channel: Channel, tmp_path: Path) -> None:
    data = os.urandom(MIB + 1)
    (tmp_path / "f").write_bytes(data)
    target = Path("/dev/shm") / tmp_path.name
    try:
        await channel.call("fs.copy", path=str(tmp_path / "f"), new_path=str(target))
        assert target.read_bytes() == data
    finally:
        target.unlink(missing_ok=True)


# -- watch -------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def watching(channel: Channel, path: Path, *, recursive: bool = False) -> AsyncIterator[CallStream]:
    async with channel.stream("fs.watch", path=str(path), recursive=recursive) as stream:
        assert await stream.recv() == (Frame.EVENT, {"ready": True})
        yield stream


async def next_events(stream: CallStream, count: int) -> list[Any]:
    events: list[Any] = []
    while len(events) < count:
        frame = await stream.recv()
        assert frame is not None
        event = frame[1]
        events.append((event["type"], *(Path(event[key]).name for key in ("path", "new_path") if key in event)))
    return events


async def test_watch_of_files(channel: Channel, tmp_path: Path) -> None:
    async with watching(channel, tmp_path) as stream:
        (tmp_path / "f").write_text("x")
        assert await next_events(stream, 2) == [("create", "f"), ("modify", "f")]
        os.chmod(tmp_path / "f", 0o600)
        assert await next_events(stream, 1) == [("attributes", "f")]
        (tmp_path / "f").rename(tmp_path / "g")
        assert await next_events(stream, 1) == [("rename", "f", "g")]
        (tmp_path / "g").unlink()
        assert await next_events(stream, 1) == [("remove", "g")]


async def test_watch_of_trees_and_renamed_directories(channel: Channel, tmp_path: Path) -> None:
    watched, outside = tmp_path / "in", tmp_path / "out"
    watched.mkdir()
    outside.mkdir()
    async with watching(channel, watched, recursive=True) as stream:
        (watched / "d").mkdir()
        assert await next_events(stream, 1) == [("create", "d")]
        (watched / "d").rename(watched / "e")
        assert await next_events(stream, 1) == [("rename", "d", "e")]
        os.mknod(watched / "e" / "f")
        frame = await stream.recv()
        assert frame is not None
        assert frame[1] == {"type": "create", "path": f"{watched}/e/f"}
        (watched / "e").rename(outside / "e")
        assert await next_events(stream, 1) == [("remove", "e")]
        os.mknod(outside / "e" / "unseen")
        (outside / "new").touch()
        (outside / "new").rename(watched / "new")
        assert await next_events(stream, 1) == [("create", "new")]


async def test_a_watched_root_that_goes(channel: Channel, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    async with watching(channel, tmp_path / "d", recursive=True) as stream:
        (tmp_path / "d").rmdir()
        assert await next_events(stream, 1) == [("remove", "d")]
    with pytest.raises(NotFound):
        await channel.call("fs.watch", path=str(tmp_path / "d"))


async def test_watches_leave_no_descriptor(channel: Channel, tmp_path: Path) -> None:
    before = (await channel.call("test.counts"))["descriptors"]
    for _ in range(5):
        async with watching(channel, tmp_path):
            pass
    while (await channel.call("test.counts"))["descriptors"] != before:
        continue
