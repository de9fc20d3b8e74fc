"""File operations of the guest on real files of this host."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.common.errors import AgentError, AlreadyExists, InvalidSpec, InvalidState, NotFound, PermissionDenied
from agent.daemon.guestlink.channel import Channel
from guest.wire import Frame
from tests.support.guest_child import MIB, collect

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the guest's server switches users, so it needs root"),
    pytest.mark.timeout(30),
]


@pytest.fixture
def home() -> Iterator[Path]:
    """Open to all users, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


async def read(channel: Channel, path: Path, **fields: Any) -> bytes:
    result, data, _ = await collect(channel, "fs.read", path=str(path), **fields)
    assert result["bytes"] == len(data.get(Frame.DATA, b""))
    return data.get(Frame.DATA, b"")


async def write(channel: Channel, path: Path, data: bytes, disposition: str = "truncate", **fields: Any) -> None:
    result, _, events = await collect(channel, "fs.write", data, path=str(path), disposition=disposition, **fields)
    assert (result["bytes"], events) == (len(data), [{"open": True}])


# -- contents ----------------------------------------------------------------------------------------------------------


async def test_what_is_written_is_read(channel: Channel, home: Path) -> None:
    for size in (0, 1, 32 << 10, 5 * MIB + 3):
        data = os.urandom(size)
        await write(channel, home / "f", data)
        assert (home / "f").read_bytes() == data
        assert await read(channel, home / "f") == data


async def test_ranges(channel: Channel, home: Path) -> None:
    data = os.urandom(MIB)
    (home / "f").write_bytes(data)
    assert await read(channel, home / "f", offset=5, length=100_000) == data[5:100_005]
    assert await read(channel, home / "f", offset=MIB - 1, length=100) == data[-1:]
    assert await read(channel, home / "f", offset=2 * MIB) == b""
    for wrong in ({"offset": -1}, {"length": "x"}, {"offset": 1 << 63}, {"offset": 1.5}):
        with pytest.raises(InvalidSpec):
            await read(channel, home / "f", **wrong)


async def test_dispositions(channel: Channel, home: Path) -> None:
    path = home / "f"
    await write(channel, path, b"0123456789", "create_new")
    with pytest.raises(AlreadyExists):
        await write(channel, path, b"x", "create_new")
    await write(channel, path, b"ab", "keep", offset=4)
    assert path.read_bytes() == b"0123ab6789"
    await write(channel, path, b"+", "append")
    assert path.read_bytes() == b"0123ab6789+"
    await write(channel, path, b"new", "truncate")
    assert path.read_bytes() == b"new"
    with pytest.raises(InvalidSpec, match="unknown disposition"):
        await write(channel, path, b"x", "other")
    with pytest.raises(NotFound):
        await write(channel, home / "g", b"x", must_exist=True)
    assert not (home / "g").exists()


async def test_modes_parents_and_owners(channel: Channel, home: Path) -> None:
    os.chmod(home, 0o777)
    await write(channel, home / "a" / "b" / "f", b"x", parents=True, mode=0o4751, user="nobody")
    facts = (home / "a" / "b" / "f").stat()
    assert (stat.S_IMODE(facts.st_mode), facts.st_uid, (home / "a").stat().st_uid) == (0o4751, 65534, 65534)
    await write(channel, home / "a" / "b" / "f", b"y", mode=0o600)
    assert stat.S_IMODE((home / "a" / "b" / "f").stat().st_mode) & 0o777 == 0o751
    with pytest.raises(NotFound):
        await write(channel, home / "none" / "f", b"x")


async def test_users_have_only_their_own_rights(channel: Channel, home: Path) -> None:
    os.chmod(home, 0o755)
    (home / "secret").write_text("x")
    os.chmod(home / "secret", 0o600)
    for action in (read(channel, home / "secret", user="nobody"), write(channel, home / "secret", b"", user="nobody"),
                   write(channel, home / "new", b"", user="nobody"),
                   channel.call("fs.mkdir", path=str(home / "d"), user="nobody"),
                   channel.call("fs.mktemp", directory=str(home), user="nobody")):  # fmt: skip
        with pytest.raises(PermissionDenied):
            await action
    assert sorted(entry.name for entry in os.scandir(home)) == ["secret"]
    assert await read(channel, home / "secret") == b"x"


async def test_what_could_block_is_refused(channel: Channel, home: Path) -> None:
    os.mkfifo(home / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(home / "s"))
    (home / "d").mkdir()
    for name in ("fifo", "s", "d"):
        with pytest.raises(AgentError):
            await read(channel, home / name)
        with pytest.raises(AgentError):
            await write(channel, home / name, b"x")
        with pytest.raises(AgentError):
            await channel.call("fs.copy", path="/etc/passwd", new_path=str(home / name))
    (home / "f").write_text("x")
    with pytest.raises(AgentError):
        await channel.call("fs.copy", path=str(home / "fifo"), new_path=str(home / "f"))
    assert (home / "f").read_text() == "x"
    assert await channel.call("test.open") == {}


async def test_a_reader_that_leaves_frees_the_file(channel: Channel, home: Path) -> None:
    before = (await channel.call("test.counts"))["descriptors"]
    (home / "f").write_bytes(bytes(8 * MIB))
    for op, fields in (("fs.read", {}), ("fs.write", {"disposition": "keep"})):
        async with channel.stream(op, path=str(home / "f"), **fields) as stream:
            await stream.recv(1)
    while (await channel.call("test.counts"))["descriptors"] != before:
        continue


# -- single files ------------------------------------------------------------------------------------------------------


async def test_stat_of_each_kind(channel: Channel, home: Path) -> None:
    (home / "f").write_text("abc")
    (home / "l").symlink_to("f")
    os.mkfifo(home / "p")
    for name, kind in (("f", "file"), ("", "directory"), ("p", "fifo")):
        assert (await channel.call("fs.stat", path=str(home / name)))["type"] == kind
    link = await channel.call("fs.stat", path=str(home / "l"), follow=False)
    assert (link["type"], link["target"]) == ("symlink", "f")
    facts = (home / "f").stat()
    info = await channel.call("fs.stat", path=str(home / "l"))
    assert (info["size"], info["mtime_ns"], info["ino"]) == (3, facts.st_mtime_ns, facts.st_ino)


async def test_names_that_are_not_utf_8(channel: Channel, home: Path) -> None:
    name = os.fsdecode(b"caf\xe9\n\xff\"'")
    path = home / name
    await write(channel, path, b"x")
    assert os.listdir(os.fsencode(home)) == [b"caf\xe9\n\xff\"'"]
    _, _, events = await collect(channel, "fs.list", path=str(home))
    assert events[0]["entries"][0]["path"] == str(path)
    await channel.call("fs.symlink", target=name, new_path=str(home / "l"))
    assert (await channel.call("fs.readlink", path=str(home / "l")))["target"] == name
    assert (await channel.call("fs.realpath", path=str(home / "l")))["path"] == str(path)
    await channel.call("fs.remove", path=str(path))
    assert os.listdir(home) == ["l"]


async def test_changes_of_one_file(channel: Channel, home: Path) -> None:
    path, other = home / "f", home / "g"
    path.write_text("0123456789")

    async def call(op: str, **fields: Any) -> Any:
        return await channel.call(f"fs.{op}", **{"path": str(path)} | fields)

    await call("chmod", mode=0o640)
    await call("chown", uid=7, gid=8)
    await call("chown", gid=9)
    await call("utime", atime_ns=1_000_000_001, mtime_ns=2_000_000_002)
    await call("truncate", size=4)
    await call("utime", mtime_ns=3)
    facts = path.stat()
    assert (stat.S_IMODE(facts.st_mode), facts.st_uid, facts.st_gid, facts.st_size) == (0o640, 7, 9, 4)
    assert (facts.st_mtime_ns, facts.st_atime_ns > 1_600_000_000 * 10**9) == (3, True)
    await call("link", new_path=str(other))
    assert other.samefile(path)
    await call("rename", new_path=str(home / "h"))
    assert sorted(os.listdir(home)) == ["g", "h"]
    for op in ("stat", "chmod", "rename", "truncate", "utime", "readlink", "realpath", "remove"):
        with pytest.raises(NotFound):
            await call(op, path=str(home / "none"), new_path=str(home / "x"), mode=0)


async def test_mkdir(channel: Channel, home: Path) -> None:
    await channel.call("fs.mkdir", path=str(home / "a"), mode=0o1777)
    assert stat.S_IMODE((home / "a").stat().st_mode) == 0o1777
    with pytest.raises(AlreadyExists):
        await channel.call("fs.mkdir", path=str(home / "a"))
    await channel.call("fs.mkdir", path=str(home / "a"), parents=True, mode=0o700)
    assert stat.S_IMODE((home / "a").stat().st_mode) == 0o1777
    await channel.call("fs.mkdir", path=str(home / "b" / "c" / "d"), parents=True)
    assert (home / "b" / "c" / "d").is_dir()


async def test_temporary_names(channel: Channel, home: Path) -> None:
    made = [(await channel.call("fs.mktemp", directory=str(home), prefix="p-", suffix=".s"))["path"] for _ in range(20)]
    assert len(set(made)) == 20
    assert all(Path(path).name.startswith("p-") and path.endswith(".s") for path in made)
    assert stat.S_IMODE(os.stat(made[0]).st_mode) == 0o600
    folder = await channel.call("fs.mktemp", directory=str(home), make_directory=True)
    assert stat.S_IMODE(os.stat(folder["path"]).st_mode) == 0o700
    wrong: list[dict[str, Any]] = [{"prefix": "../x"}, {"suffix": "/x"}, {"prefix": "\0"}]
    for fields in wrong:
        with pytest.raises(InvalidSpec):
            await channel.call("fs.mktemp", directory=str(home), **fields)


@pytest.mark.parametrize("path", ["", None, 7, "/a\0b", "/" + "x" * 5000, ["/"]])
async def test_paths_that_are_none(channel: Channel, path: object) -> None:
    for op in ("fs.read", "fs.stat", "fs.list", "fs.remove", "fs.watch"):
        with pytest.raises(InvalidSpec):
            await channel.call(op, path=path)


async def test_errors_have_the_kernels_words(channel: Channel, home: Path) -> None:
    (home / "f").write_text("")
    (home / "loop").symlink_to("loop")
    for path, kind, name in (
        (home / "f" / "x", InvalidState, "ENOTDIR"), (home / "loop", InvalidState, "ELOOP"),
        (home / ("x" * 300), InvalidSpec, "ENAMETOOLONG"), (home / "none", NotFound, "ENOENT"),
    ):  # fmt: skip
        with pytest.raises(kind) as caught:
            await channel.call("fs.stat", path=str(path))
        assert caught.value.reason == name
        assert str(path) in caught.value.message
