"""How the guest starts a program: lookup, environment, directory, user, and each way to fail."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.common.errors import InvalidSpec, InvalidState
from agent.daemon.guestlink.channel import Channel
from tests.support.guest_child import Guest
from tests.unit.guest.test_guest_process import run, shell, spec

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the guest's server switches users, so it needs root"),
    pytest.mark.timeout(30),
]


def program(directory: Path, name: str, text: str, mode: int = 0o755) -> str:
    path = directory / name
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(
    ("name", "text", "mode", "reason"),
    [
        ("missing", None, 0, "EXEC_NOT_FOUND"),
        ("plain", "#!/bin/sh\n", 0o644, "EXEC_NOT_EXECUTABLE"),
        ("bad-interpreter", "#!/no/such/interpreter\n", 0o755, "EXEC_NOT_FOUND"),
        ("noise", "\x00\x01\x02", 0o755, "EXEC_NOT_EXECUTABLE"),
        ("", None, 0, "EXEC_NOT_EXECUTABLE"),
    ],
)
async def test_programs_that_cannot_be_run(
    channel: Channel, tmp_path: Path, name: str, text: str | None, mode: int, reason: str
) -> None:
    path = f"{tmp_path}/{name}" if text is None else program(tmp_path, name, text, mode)
    before = (await channel.call("test.counts"))["descriptors"]
    for fields in ({}, {"stdin": "pipe"}, {"tty": {"rows": 1, "cols": 1}}):
        with pytest.raises(InvalidState) as caught:
            await run(channel, spec(path, **fields))
        assert caught.value.reason == reason
    assert (await channel.call("test.counts"))["descriptors"] == before


async def test_the_path_is_searched_as_execvp_does(channel: Channel, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    program(tmp_path / "a", "tool", "not executable", 0o644)
    program(tmp_path / "b", "tool", "#!/bin/sh\necho b\n")
    env = {"PATH": f"{tmp_path}/a:{tmp_path}/none:{tmp_path}/b:/usr/bin:/bin"}
    assert (await run(channel, spec("tool", env=env)))[1] == b"b\n"
    (tmp_path / "b" / "tool").unlink()
    with pytest.raises(InvalidState) as caught:
        await run(channel, spec("tool", env=env))
    assert caught.value.reason == "EXEC_NOT_EXECUTABLE"
    with pytest.raises(InvalidState, match="127"):
        await run(channel, spec("no-such-tool"))


@pytest.mark.parametrize("cwd", ["/no/such/directory", "/etc/passwd", "relative"])
async def test_a_directory_that_cannot_be_entered(channel: Channel, cwd: str) -> None:
    with pytest.raises(InvalidState) as caught:
        await run(channel, spec("true", cwd=cwd))
    assert caught.value.reason == "CWD_INVALID"


async def test_a_directory_is_entered_with_the_rights_of_the_user(channel: Channel, tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o700)
    assert (await run(channel, shell("pwd", cwd=str(tmp_path))))[1] == f"{tmp_path}\n".encode()
    with pytest.raises(InvalidState) as caught:
        await run(channel, shell("pwd", cwd=str(tmp_path), user="nobody"))
    assert caught.value.reason == "CWD_INVALID"


@pytest.mark.parametrize("user", ["nobody", "65534", 1000])
async def test_nothing_of_root_is_left_in_a_process_of_a_user(channel: Channel, user: object) -> None:
    _, output, _ = await run(channel, spec("cat", "/proc/self/status", user=user))
    lines = dict(line.split(":", 1) for line in output.decode().splitlines())
    number = "1000" if user == 1000 else "65534"
    # Real, effective, saved, file system.
    assert lines["Uid"].split() == [number] * 4
    assert len(set(lines["Gid"].split())) == 1
    assert "0" not in lines["Gid"].split()
    assert set(lines["Groups"].split()) == set(lines["Gid"].split())
    assert int(lines["CapPrm"], 16) == int(lines["CapEff"], 16) == int(lines["CapInh"], 16) == 0


async def test_unknown_users(channel: Channel) -> None:
    for user in ("no-such-user", "-1", "4294967296", "root "):
        with pytest.raises(InvalidState) as caught:
            await run(channel, spec("true", user=user))
        assert caught.value.reason == "USER_UNKNOWN"


async def test_environment(channel: Channel) -> None:
    name = os.fsdecode(b"\xff")
    _, output, _ = await run(channel, spec("/usr/bin/env", env={"A": "b=c", "LANG": "de", "N": name}, user="nobody"))
    lines = output.split(b"\n")
    assert {b"A=b=c", b"LANG=de", b"N=\xff", b"USER=nobody", b"LOGNAME=nobody"} <= set(lines)
    assert any(line.startswith(b"PATH=/usr/local/sbin:") for line in lines)
    assert {line.partition(b"=")[0] for line in lines if line} == {
        b"A", b"LANG", b"N", b"USER", b"LOGNAME", b"PATH", b"HOME", b"SHELL",
    }  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [{"argv": []}, {"argv": [""]}, {"argv": "ls"}, {"argv": [1]}, {"argv": ["a\0b"]}, {"env": {"": "x"}},
     {"env": {"a=b": "x"}}, {"env": {"a": 1}}, {"env": {"a": "\0"}}, {"env": ["x"]}, {"cwd": "/\0"},
     {"replay": -1}, {"replay": 1 << 30}, {"replay": "x"}, {"replay": True}, {"tty": {"rows": "x", "cols": 1}}],
)  # fmt: skip
async def test_malformed_requests(channel: Channel, fields: dict[str, object]) -> None:
    before = (await channel.call("test.counts"))["descriptors"]
    with pytest.raises(InvalidSpec):
        await run(channel, spec("true") | fields)
    assert (await channel.call("test.counts"))["descriptors"] == before


async def test_arguments_as_long_as_the_kernel_takes_and_longer(channel: Channel) -> None:
    long = "x" * 100_000
    assert (await run(channel, shell('echo "${#1}"', argv=["/bin/sh", "-c", 'echo "${#1}"', "sh", long])))[
        1
    ] == b"100000\n"
    with pytest.raises(InvalidSpec, match="too long") as caught:
        await run(channel, spec("true", "x" * 140_000))
    assert caught.value.reason == "E2BIG"


async def test_descriptors_signals_and_session_are_fresh(channel: Channel) -> None:
    _, output, _ = await run(channel, shell("ls -l /proc/self/fd | grep -c -- '->'"))
    assert int(output) == 4  # three, and the directory that ls reads
    _, output, _ = await run(channel, shell("grep -E '^Sig(Blk|Ign)' /proc/self/status"))
    blocked, ignored = (int(word, 16) for word in output.split()[1::2])
    # posix_spawn(3) of glibc leaves its own two signals, 32 and 33, ignored.
    assert (blocked, ignored & ~(3 << 31)) == (0, 0)
    _, output, _ = await run(channel, shell("cut -d ' ' -f 1,5,6 /proc/$$/stat"))
    pid, group, session = output.split()
    assert pid == group == session


async def test_after_a_user_the_server_is_root_again(channel: Channel, child: Guest) -> None:
    await run(channel, spec("true", user="nobody"))
    with pytest.raises(InvalidState):
        await run(channel, spec("/none", user="nobody"))
    status = Path(f"/proc/{child.process.pid}/status").read_text()  # noqa: ASYNC240  procfs
    lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert lines["Uid"].split() == lines["Gid"].split() == ["0"] * 4
    assert os.readlink(f"/proc/{child.process.pid}/cwd") == "/"
