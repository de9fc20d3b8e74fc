"""The small parts of the guest: users, fields, the log of output, memory kills."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest import params, reactor, user
from guest.call import HEADROOM, os_error
from guest.oom import OomWatcher
from guest.output import OutputLog, Reader
from guest.wire import CallError, Frame

pytestmark = pytest.mark.timeout(30)


# -- users and fields --------------------------------------------------------------------------------------------------


@pytest.fixture
def passwd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Files in place of /etc/passwd and /etc/group."""
    (tmp_path / "passwd").write_bytes(
        b"root:x:0:0:root:/root:/bin/bash\nann:x:1000:100:A\xffn:/home/ann:/bin/zsh\n"
        b"# broken\nbob:x:1001\nnone:x:7:7:::\n"
    )
    (tmp_path / "group").write_bytes(b"users:x:100:\nwheel:x:10:bob,ann\nannex:x:11:annie\nbroken\n")
    real_lines = user._lines
    monkeypatch.setattr(user, "_lines", lambda path: real_lines(str(tmp_path / Path(path).name)))
    files = SimpleNamespace(stat=lambda path: (tmp_path / Path(path).name).stat())
    monkeypatch.setattr(user, "os", files)
    monkeypatch.setattr(user, "_cache_key", ())
    return tmp_path / "passwd"


def test_users(passwd: Path) -> None:
    ann = user.lookup_user("ann")
    assert (ann.uid, ann.gid, ann.groups, ann.home, ann.shell) == (1000, 100, [10, 100], "/home/ann", "/bin/zsh")
    assert user.lookup_user("1000") is not None
    assert user.lookup_user("1000").name == "ann"
    none = user.lookup_user("none")
    assert (none.home, none.shell) == ("/", "/bin/sh")
    number = user.lookup_user("4294967295")
    assert (number.uid, number.groups, number.home) == (4294967295, [4294967295], "/")
    for text in ("bob", "", "x", "-1", "4294967296", "1e3"):
        with pytest.raises(CallError) as caught:
            user.lookup_user(text)
        assert caught.value.errno == "USER_UNKNOWN"


def test_a_change_of_the_files_is_seen(passwd: Path) -> None:
    assert user.lookup_user("ann").uid == 1000
    passwd.write_text("ann:x:5:5::/:/bin/sh\n")
    os.utime(passwd, ns=(1, 1))
    assert user.lookup_user("ann").uid == 5


def test_fields() -> None:
    assert params.path({"path": "/a"}) == "/a"
    assert params.path({"path": "a/b"}) == "/home/sandbox/a/b"
    assert params.number({}, "n") == 0
    assert params.optional_number({"n": None}, "n") is None
    assert params.optional_number({"n": 0}, "n") == 0
    assert params.mode({}, 0o644) == 0o644
    assert params.mode({"mode": 0}, 0o644) == 0
    for mode in (0o10000, -1, "7", 1.0):
        with pytest.raises(CallError):
            params.mode({"mode": mode}, 0)
    with pytest.raises(CallError):
        params.path({"path": "\u00e4" * 2048})


def test_errno_words() -> None:
    error = os_error(FileNotFoundError(2, "No such file", "/x"))
    assert (error.code, error.message, error.errno) == ("NOT_FOUND", "/x: No such file", "ENOENT")
    assert os_error(OSError("no number")).code == "STATE"


# -- output ------------------------------------------------------------------------------------------------------------


class FakeCall:
    """Takes chunks as fast as the test allows."""

    def __init__(self) -> None:
        self.data = b""
        self.may_send = reactor.Waiters()
        self.blocked = False

    async def send_buffer(self, kind: int, buffer: bytearray, size: int) -> None:
        while self.blocked:
            await self.may_send.wait()
        self.data += buffer[HEADROOM : HEADROOM + size]


def append(log: OutputLog, data: bytes) -> None:
    log.append(Frame.STDOUT, bytearray(HEADROOM) + data, len(data))


def follow(log: OutputLog, reader: Reader, call: FakeCall) -> reactor.Task:
    return reactor.spawn(log.follow(reader, call))  # type: ignore[arg-type]


def turns(count: int = 5) -> None:
    for _ in range(count):
        reactor.spawn(reactor.checkpoint())
        reactor.run_once()


@settings(derandomize=True, database=None, deadline=None, max_examples=80)
@given(
    st.lists(st.one_of(st.binary(min_size=1, max_size=50), st.sampled_from(["join", "block", "go"])), max_size=40),
    st.integers(0, 200),
)
def test_every_reader_gets_the_rest_of_what_it_joined(script: list[Any], limit: int) -> None:
    log, written = OutputLog(limit), b""
    calls: list[tuple[FakeCall, bytes, int, reactor.Task]] = []
    for step in script:
        if isinstance(step, bytes):
            append(log, step)
            written += step
        elif step == "join":
            reader, dropped = log.open_reader(replay=True)
            call = FakeCall()
            assert dropped <= max(0, len(written) - limit // 2)
            assert dropped >= len(written) - limit or calls
            calls.append((call, written, dropped, follow(log, reader, call)))
        for call, *_ in calls:
            call.blocked = step == "block" or (call.blocked and step != "go")
            call.may_send.wake()
        turns(2)
    for call, *_ in calls:
        call.blocked = False
        call.may_send.wake()
    log.finish()
    turns(3)
    for call, _, dropped, task in calls:
        assert task.done
        assert call.data == written[dropped:]


def test_without_readers_only_the_end_is_kept() -> None:
    log = OutputLog(100)
    for number in range(1000):
        append(log, b"%09d\n" % number)
    reader, dropped = log.open_reader(replay=True)
    assert dropped == 9900
    late, none = log.open_reader(replay=False)
    log.finish()
    calls = FakeCall(), FakeCall()
    tasks = follow(log, reader, calls[0]), follow(log, late, calls[1])
    turns()
    assert all(task.done for task in tasks)
    assert (len(calls[0].data), calls[1].data, none) == (100, b"", 0)


def test_the_writer_waits_for_the_slowest_reader_until_it_leaves() -> None:
    log = OutputLog(100)
    reader, _ = log.open_reader(replay=True)
    for _ in range(300):
        append(log, bytes(1024))
    waiting = reactor.spawn(log.wait_for_room())
    turns()
    assert not waiting.done
    log.close_reader(reader)
    turns()
    assert waiting.done
    assert log._end_offset - log._first_offset <= 1024


# -- memory kills ------------------------------------------------------------------------------------------------------


def test_kills_in_the_kernels_log(tmp_path: Path) -> None:
    path = tmp_path / "kmsg"
    path.write_bytes(b"6,1,1,-;Out of memory: Killed process 11 (old) total-vm\n")
    watcher = OomWatcher(str(path))
    with path.open("ab", buffering=0) as log:
        assert not watcher.killed(11)
        log.write(b"3,2,2,-;Out of memory: Killed process 321 (python3) total-vm:1kB\n")
        assert watcher.killed(321)
        assert not watcher.killed(321)
        for forged in (
            b"12,3,3,-;Killed process 5 (x)\n", b"x,3,3,-;Killed process 5 (x)\n", b"6,3,3,-;Killed process x\n",
            b"Killed process 5 (x)\n", b"6,3,3,-;nothing\n",
        ):  # fmt: skip
            log.write(forged)
            assert not watcher.killed(5)
        for number in range(5000):
            log.write(b"6,9,9,-;Memory cgroup out of memory: Killed process %d (x)\n" % number)
            watcher._read_log()
    assert len(watcher._killed) <= 4096
    assert watcher.killed(4999)
    os.close(watcher._fd)
    assert not OomWatcher(str(tmp_path / "none")).killed(1)
