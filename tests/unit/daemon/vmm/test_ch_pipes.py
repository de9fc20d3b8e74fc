"""The pipes of a Cloud Hypervisor process: bounded, never in its way, and found again."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from agent.common.errors import VmmError
from agent.daemon.vmm.cloud_hypervisor.pipes import Log, Pipe, VmmEvents

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
async def closing() -> AsyncIterator[Callable[[Pipe], Pipe]]:
    pipes: list[Pipe] = []

    def keep(pipe: Pipe) -> Pipe:
        pipes.append(pipe)
        return pipe

    yield keep
    for pipe in pipes:
        pipe.close()
        pipe.close()


Keep = Callable[[Pipe], Pipe]


def event(source: str, name: str) -> bytes:
    facts = {"timestamp": {"secs": 0, "nanos": 1}, "source": source, "event": name, "properties": None}
    return json.dumps(facts, indent=2).encode() + b"\n\n"


def fill(fd: int) -> None:
    while True:
        os.write(fd, b"x" * 65536)


async def settled(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_log_is_bounded(tmp_path: Path, closing: Keep) -> None:
    log = Log(tmp_path / "pipe", tmp_path / "log", limit_bytes=100)
    closing(log.pipe)
    with log.pipe.writer() as fd:
        for number in range(100):
            os.write(fd, b"%09d\n" % number)
            log.pipe.drain()
        os.write(fd, b"x" * 1000 + b"the end")
    assert log.tail(7) == b"the end"
    assert sum(path.stat().st_size for path in (tmp_path / "log", tmp_path / "log.1")) <= 100
    assert log.tail(1000).endswith(b"x" * 43 + b"the end")
    assert log.tail(0) == b""
    log.pipe.close()
    assert log.tail(3) == b"end"


async def test_a_tail_goes_back_to_the_file_before(tmp_path: Path, closing: Keep) -> None:
    log = Log(tmp_path / "pipe", tmp_path / "log", limit_bytes=20)
    closing(log.pipe)
    assert log.tail(10) == b""
    with log.pipe.writer() as fd:
        for word in (b"12345678", b"abcdefgh"):
            os.write(fd, word)
            log.pipe.drain()
    assert log.tail(100) == b"12345678abcdefgh"
    assert log.tail(10) == b"78abcdefgh"


async def test_what_was_said_before_the_end_is_kept(tmp_path: Path) -> None:
    log = Log(tmp_path / "pipe", tmp_path / "log")
    with log.pipe.writer() as fd:
        os.write(fd, b"last words")
        log.pipe.close()
    assert (tmp_path / "log").read_bytes() == b"last words"


async def test_a_log_that_cannot_be_written_is_no_error(tmp_path: Path, closing: Keep) -> None:
    log = Log(tmp_path / "pipe", tmp_path / "none" / "log")
    closing(log.pipe)
    with log.pipe.writer() as fd:
        os.write(fd, b"text")
    assert log.tail(10) == b""


async def test_a_writer_never_waits_and_never_ends(tmp_path: Path, closing: Keep) -> None:
    got: list[bytes] = []
    first = Pipe(tmp_path / "pipe", got.append)
    with first.writer() as fd:
        first.close()
        os.write(fd, b"nobody reads this yet;")
        with pytest.raises(BlockingIOError):
            fill(fd)
        again = Pipe(tmp_path / "pipe", got.append)  # an agent that came back
        closing(again)
        again.drain()
        os.write(fd, b"and this")
        again.drain()
    assert got[0].startswith(b"nobody reads")
    assert got[-1].endswith(b"and this")


async def test_a_pipe_is_read_by_the_loop(tmp_path: Path, closing: Keep) -> None:
    got: list[bytes] = []
    pipe = closing(Pipe(tmp_path / "pipe", got.append))
    with pipe.writer() as fd:
        os.write(fd, b"text")
    await settled(lambda: got == [b"text"])


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    async def run() -> None:
        os.mkfifo(tmp_path / "else")
        (tmp_path / "pipe").symlink_to(tmp_path / "else")
        with pytest.raises(OSError, match="symbolic links"):
            Pipe(tmp_path / "pipe", print)

    asyncio.run(run())


# -- events ------------------------------------------------------------------------------------------------------------


async def test_events_in_pieces(tmp_path: Path, closing: Keep) -> None:
    events = VmmEvents(tmp_path / "events")
    closing(events.pipe)
    happened: list[str] = []
    events.on_event = happened.append
    text = event("vmm", "starting") + event("vm", "restored") + event("vm", "resumed")
    waiter = asyncio.create_task(events.wait_for("vm resumed", 5))
    with events.pipe.writer() as fd:
        for start in range(0, len(text), 11):
            await asyncio.sleep(0)
            assert not waiter.done()
            os.write(fd, text[start : start + 11])
            events.pipe.drain()
    await waiter
    assert list(events.recent) == happened == ["vmm starting", "vm restored", "vm resumed"]
    await events.wait_for("vm restored", 0)
    with pytest.raises(VmmError, match="did not report 'vm paused'"):
        await events.wait_for("vm paused", 0.01)
    assert events._waiters == []


async def test_hostile_events(tmp_path: Path, closing: Keep) -> None:
    events = VmmEvents(tmp_path / "events")
    closing(events.pipe)
    with events.pipe.writer() as fd:
        for noise in (b"\n\n\n\n", b"{\n\n", b"[]\n\n", b"7\n\n", b"null\n\n", b'{"source": 1}\n\n', b"\xff\n\n",
                      b"[" * 50_000 + b"\n\n", b"x" * 200_000):  # fmt: skip
            os.write(fd, noise)
            events.pipe.drain()
        assert len(events._buffer) <= 65536
        os.write(fd, b"\n\n" + event("vm", "booted"))
        events.pipe.drain()
        assert list(events.recent) == ["vm booted"]
        for _ in range(1000):
            os.write(fd, event("vm", "x"))
            events.pipe.drain()
    assert len(events.recent) == 64
