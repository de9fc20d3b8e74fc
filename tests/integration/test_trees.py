"""FileService on directories and trees: list, walk, glob, copy, remove, watch."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from sandboxd.v1 import file_pb2 as pb
from tests.support.daemon import refused, until
from tests.support.files import HOME, Files

pytestmark = pytest.mark.vm

NOT_FOUND, PRECONDITION = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION
INVALID = grpc.StatusCode.INVALID_ARGUMENT
TREE = "mkdir -p t/a/b/c t/.hidden t/other; touch t/a/x.py t/a/b/y.py t/a/b/c/z.txt t/.hidden/h.py t/.dot.py"
Event = pb.WatchResponse


async def pages(files: Files, name: str, **fields: Any) -> list[list[pb.FileInfo]]:
    call = getattr(files.client.files, name)(getattr(pb, f"{name}Request")(sandbox_id=files.id, **fields))
    return [list(page.entries) async for page in call]


async def paths(files: Files, name: str, **fields: Any) -> list[str]:
    """Returns what a streaming call finds, relative to the home directory."""
    return [entry.path.removeprefix(f"{HOME}/") for page in await pages(files, name, **fields) for entry in page]


async def test_a_list_of_thousands_comes_in_pages(files: Files) -> None:
    await files.sh(f"mkdir {HOME}/many; cd {HOME}/many; seq 1 3000 | xargs touch")
    found = await pages(files, "ListDirectory", path="many")
    assert len(found) > 3
    assert max(len(page) for page in found) <= 1000
    entries = [entry for page in found for entry in page]
    assert {entry.path for entry in entries} == {f"{HOME}/many/{number}" for number in range(1, 3001)}
    assert {entry.type for entry in entries} == {pb.FileInfo.TYPE_FILE}
    assert await pages(files, "ListDirectory", path="/mnt") == []
    for path, code, why in (("none", NOT_FOUND, "ENOENT"), ("many/1", PRECONDITION, "ENOTDIR")):
        with refused(code, why):
            await pages(files, "ListDirectory", path=path)
    with refused(NOT_FOUND, "ENOENT"):
        await pages(files, "Walk", path="none")


async def test_names_that_are_not_utf8_keep_their_bytes(files: Files) -> None:
    await files.sh(f"mkdir {HOME}/odd; cd {HOME}/odd; touch $(printf 'a\\377b') ü; ln -s $(printf '\\376') link")
    for name in ("ListDirectory", "Walk"):
        found = {entry.path: entry for page in await pages(files, name, path="odd") for entry in page}
        broken = found[f"{HOME}/odd/a\ufffdb"]
        assert broken.path_bytes == f"{HOME}/odd/".encode() + b"a\xffb"
        assert found[f"{HOME}/odd/ü"].path_bytes == b""
        assert found[f"{HOME}/odd/link"].link_target == "\ufffd"


async def test_walk_and_glob(files: Files) -> None:
    await files.sh(f"cd {HOME}; {TREE}; ln -s .. t/other/up; ln -s nowhere t/dangling")
    everything = [
        "t", "t/.dot.py", "t/.hidden", "t/.hidden/h.py", "t/a", "t/a/b", "t/a/b/c", "t/a/b/c/z.txt", "t/a/b/y.py",
        "t/a/x.py", "t/dangling", "t/other", "t/other/up",
    ]  # fmt: skip
    assert await paths(files, "Walk", path="t") == everything
    assert await paths(files, "Walk", path="t", max_depth=0) == ["t"]
    assert await paths(files, "Walk", path="t/a", max_depth=1) == ["t/a", "t/a/b", "t/a/x.py"]
    followed = await paths(files, "Walk", path="t/other", follow_symlinks=True)
    assert "t/other/up/a/b/c/z.txt" in followed  # and its cycle is cut
    assert len(followed) < 40
    for pattern, fields, wanted in (
        ("t/*", {}, ["t/a", "t/dangling", "t/other"]),
        ("t/**/*.py", {}, ["t/a/b/y.py", "t/a/x.py"]),
        ("t/**/*.py", {"include_hidden": True}, ["t/.dot.py", "t/.hidden/h.py", "t/a/b/y.py", "t/a/x.py"]),
        ("**/[x-z].*", {}, ["t/a/b/c/z.txt", "t/a/b/y.py", "t/a/x.py"]),
        ("a/?", {"root": f"{HOME}/t"}, ["t/a/b"]),
        ("a/*", {"root": "t", "exclude_directories": True}, ["t/a/x.py"]),
        (f"{HOME}/t/.hidden/*", {}, ["t/.hidden/h.py"]),
        ("none/*", {}, []),
        ("t/a/x.py", {}, ["t/a/x.py"]),
    ):
        assert await paths(files, "Glob", pattern=pattern, **fields) == wanted, pattern
    for pattern in ("", "a\0b", "../*", "x" * 100_000):
        with refused(INVALID, "INVALID_SPEC"):
            await paths(files, "Glob", pattern=pattern)


async def test_a_deep_tree_is_walked_copied_and_removed(files: Files) -> None:
    await files.sh(f"cd {HOME}; p=d; for i in $(seq 1 100); do p=$p/d; done; mkdir -p $p; echo deep >$p/file")
    found = await paths(files, "Walk", path="d")
    assert len(found) == 102
    await files.call("Copy", path="d", new_path="copied", recursive=True)
    assert await files.read("copied/" + "d/" * 100 + "file") == b"deep\n"
    for path in ("d", "copied"):
        await files.call("Remove", path=path, recursive=True)
    assert await paths(files, "ListDirectory", path=HOME) == []


async def test_a_copy_keeps_what_a_tree_is(files: Files) -> None:
    await files.sh(
        f"cd {HOME}; {TREE}; ln -s a/x.py t/link; chmod 0751 t/a; chown 5:6 t/a/x.py; chmod 0640 t/a/x.py;"
        "touch -d 2001-02-03T04:05:06Z t/a; truncate -s 1G t/holes; echo end >>t/holes"
    )
    await files.call("Copy", path="t", new_path="copy", recursive=True)
    kept = ("type", "mode", "uid", "gid", "link_target", "modify_time")

    async def facts(root: str) -> dict[str, list[Any]]:
        found = [entry for page in await pages(files, "Walk", path=root) for entry in page]
        return {entry.path.removeprefix(f"{HOME}/{root}"): [getattr(entry, name) for name in kept] for entry in found}

    assert await facts("copy") == await facts("t")
    holes = await files.stat("copy/holes")
    assert holes.size_bytes == (1 << 30) + 4
    assert holes.blocks < 100


async def test_remove_never_crosses_into_another_file_system(files: Files) -> None:
    await files.sh(f"cd {HOME}; mkdir -p m/mounted m/outside; touch m/a; mount -t tmpfs tmpfs m/mounted")
    await files.sh(f"cd {HOME}; touch m/mounted/kept; mkdir away; touch away/kept; ln -s ../away m/outside/link")
    try:
        with refused(PRECONDITION, "EXDEV"):
            await files.call("Remove", path="m", recursive=True)
        assert (await files.stat("m/mounted/kept")).type == pb.FileInfo.TYPE_FILE
        with refused(PRECONDITION, "EBUSY"):
            await files.call("Remove", path="m/mounted", recursive=True)
    finally:
        await files.sh(f"umount {HOME}/m/mounted")
    await files.call("Remove", path="m", recursive=True)
    assert await paths(files, "ListDirectory", path="away") == ["away/kept"]


class Watching:
    """A watch that a test reads from."""

    def __init__(self, files: Files, path: str, *, recursive: bool) -> None:
        request = pb.WatchRequest(sandbox_id=files.id, path=path, recursive=recursive)
        self.seen: list[tuple[int, str, str]] = []
        self._task = asyncio.create_task(self._read(files.client.files.Watch(request)))

    async def _read(self, call: Any) -> None:
        async for event in call:
            self.seen.append((event.type, event.path.removeprefix(f"{HOME}/"), event.new_path.removeprefix(f"{HOME}/")))

    async def sees(self, kind: int, path: str, new_path: str = "") -> None:
        async def has() -> bool:
            return (kind, path, new_path) in self.seen

        await until(has)

    def stop(self) -> None:
        self._task.cancel()


async def test_a_watch_sees_every_change(files: Files) -> None:
    await files.sh(f"cd {HOME}; mkdir w; echo x >w/old")
    watch = Watching(files, "w", recursive=True)
    await watch.sees(Event.TYPE_READY, "w")
    for script, events in (
        ("echo y >>w/old", [(Event.TYPE_MODIFY, "w/old")]),
        ("touch w/new", [(Event.TYPE_CREATE, "w/new")]),
        ("chmod 600 w/new", [(Event.TYPE_ATTRIBUTES, "w/new")]),
        ("mv w/new w/newer", [(Event.TYPE_RENAME, "w/new", "w/newer")]),
        ("rm w/newer", [(Event.TYPE_REMOVE, "w/newer")]),
        ("mkdir w/d", [(Event.TYPE_CREATE, "w/d")]),
        ("echo z >w/d/later", [(Event.TYPE_CREATE, "w/d/later")]),
        ("mkdir -p w/e/f/g; touch w/e/f/g/h", [(Event.TYPE_CREATE, "w/e/f/g"), (Event.TYPE_CREATE, "w/e/f/g/h")]),
        ("mv w/e w/moved", [(Event.TYPE_RENAME, "w/e", "w/moved")]),
        ("touch w/moved/f/g/i", [(Event.TYPE_CREATE, "w/moved/f/g/i")]),
        ("mv w/old away", [(Event.TYPE_REMOVE, "w/old")]),
        ("mv away w/back", [(Event.TYPE_CREATE, "w/back")]),
        ("rm -r w/moved", [(Event.TYPE_REMOVE, "w/moved/f/g/h"), (Event.TYPE_REMOVE, "w/moved")]),
    ):
        await files.sh(f"cd {HOME}; {script}")
        for event in events:
            await watch.sees(*event)
    watch.stop()
    with refused(NOT_FOUND, "ENOENT"):
        async for _ in files.client.files.Watch(pb.WatchRequest(sandbox_id=files.id, path="none")):
            raise AssertionError("watched")


async def test_a_watch_that_is_not_recursive_stays_in_its_directory(files: Files) -> None:
    await files.sh(f"cd {HOME}; mkdir -p w/d")
    watch = Watching(files, "w", recursive=False)
    await watch.sees(Event.TYPE_READY, "w")
    await files.sh(f"cd {HOME}; touch w/d/inside; touch w/last")
    await watch.sees(Event.TYPE_CREATE, "w/last")
    assert not [event for event in watch.seen if "inside" in event[1]]
    watch.stop()
