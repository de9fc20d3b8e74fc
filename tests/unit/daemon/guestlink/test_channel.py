"""The host's channel and the guest's server against each other, without a VM."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import tracemalloc

import pytest

from agent.common.errors import (
    AgentError,
    AlreadyExists,
    DeadlineExceeded,
    GuestError,
    GuestUnreachable,
    InvalidSpec,
    InvalidState,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from agent.daemon.guestlink import channel as channel_module
from agent.daemon.guestlink.channel import Channel
from agent.daemon.guestlink.protocol import LinkProtocol
from guest.wire import Frame
from tests.support.guest_child import MIB, Guest, collect

pytestmark = pytest.mark.timeout(30)


async def eventually(channel: Channel, **expected: int) -> None:
    """Asks the guest until its counts are these; each question is a turn of its reactor."""
    async with asyncio.timeout(5):
        while True:
            counts = await channel.call("test.counts")
            if {name: counts[name] for name in expected} == expected:
                return


async def test_a_call_has_one_answer(channel: Channel) -> None:
    text = "caf\xe9 \U0001f600 \udcff"
    result, data, _ = await collect(channel, "test.echo", b"abc", text=text)
    assert (result, data) == ({"bytes": 3, "text": text}, {Frame.DATA: b"abc", Frame.EOF: b""})


async def test_a_result_larger_than_every_window(channel: Channel) -> None:
    assert len((await channel.call("test.result", size=MIB * 3 // 2))["text"]) == MIB * 3 // 2


async def test_a_request_larger_than_every_window(channel: Channel) -> None:
    text = "y" * (MIB * 3 // 2)
    result, _, _ = await collect(channel, "test.echo", b"", text=text)
    assert result["text"] == text


async def test_a_request_over_the_limit_is_refused_and_the_link_goes_on(channel: Channel) -> None:
    with pytest.raises(InvalidSpec) as caught:
        await channel.call("test.echo", text="y" * (2 * MIB))
    assert caught.value.reason == "REQUEST_TOO_LARGE"
    assert await channel.call("test.open") == {}


@pytest.mark.parametrize(
    ("code", "expected"),
    [("NOT_FOUND", NotFound), ("EXISTS", AlreadyExists), ("DENIED", PermissionDenied), ("INVALID", InvalidSpec),
     ("STATE", InvalidState), ("EXHAUSTED", ResourceExhausted), ("INTERNAL", GuestError), ("UNSUPPORTED", GuestError),
     ("new word", GuestError)],
)  # fmt: skip
async def test_errors_of_the_guest_are_errors_of_ours(channel: Channel, code: str, expected: type[AgentError]) -> None:
    with pytest.raises(expected, match=r"^as asked$") as caught:
        await channel.call("test.fail", code=code, errno="EXEC_NOT_FOUND")
    assert type(caught.value) is expected
    assert caught.value.reason == "EXEC_NOT_FOUND"


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOENT, NotFound), (errno.EEXIST, AlreadyExists), (errno.EACCES, PermissionDenied),
     (errno.ENOSPC, ResourceExhausted), (errno.ENOTDIR, InvalidState), (errno.ENAMETOOLONG, InvalidSpec)],
)  # fmt: skip
async def test_an_errno_keeps_its_name(channel: Channel, number: int, expected: type[AgentError]) -> None:
    with pytest.raises(expected, match="/some/path") as caught:
        await channel.call("test.fail", kind="os", errno=number)
    assert caught.value.reason == errno.errorcode[number]


async def test_unknown_operations_and_bugs_of_handlers(channel: Channel) -> None:
    with pytest.raises(GuestError, match="unknown operation"):
        await channel.call("no.such")
    with pytest.raises(InvalidSpec, match="bad request"):
        await channel.call("test.fail", kind="value")
    with pytest.raises(GuestUnreachable) as caught:
        await channel.call("test.fail", kind="bug")
    assert caught.value.reason == "GUEST_CALL_ABORTED"
    assert await channel.call("test.open") == {}


async def test_a_deadline_ends_the_guests_task(channel: Channel) -> None:
    before = (await channel.call("test.counts"))["abandoned"]
    with pytest.raises(DeadlineExceeded, match=r"test.hang within 0.05 s"):
        await channel.call("test.hang", timeout_s=0.05)
    await eventually(channel, running=0, abandoned=before + 1)


async def test_cancellation_ends_the_guests_task(channel: Channel) -> None:
    before = (await channel.call("test.counts"))["abandoned"]
    calls = [asyncio.create_task(channel.call("test.hang")) for _ in range(50)]
    await eventually(channel, running=50)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    await eventually(channel, running=0, abandoned=before + 50)
    assert not channel._link.session.streams


async def test_closing_the_link_ends_the_guests_tasks_and_waiting_calls(child: Guest) -> None:
    async with child.channel() as channel:
        call = asyncio.create_task(channel.call("test.hang"))
        await eventually(channel, running=1)
    with pytest.raises(GuestUnreachable, match="closed by the agent"):
        await call
    with pytest.raises(GuestUnreachable):
        await channel.call("test.open")
    async with child.channel() as channel:
        await eventually(channel, running=0)


async def test_a_new_link_replaces_the_old_one(child: Guest) -> None:
    async with child.channel() as old, child.channel() as new:
        assert await new.call("test.open") == {}
        async with asyncio.timeout(5):
            reason = await asyncio.shield(old.lost)
        assert isinstance(reason, GuestUnreachable)


async def test_many_links_leave_no_descriptor_behind(child: Guest) -> None:
    async with child.channel() as channel:
        before = (await channel.call("test.counts"))["descriptors"]
    for _ in range(20):
        async with child.channel():
            pass
    async with child.channel() as channel:
        await eventually(channel, descriptors=before)


async def test_too_many_streams(channel: Channel) -> None:
    channel._link.session._max_streams = 5
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(channel.stream("test.sink"))
        with pytest.raises(ResourceExhausted, match="too many calls"):
            await channel.call("test.open")
    assert await channel.call("test.open") == {}


async def test_many_writers_at_once_do_not_look_like_a_guest_that_does_not_read(channel: Channel) -> None:
    data = bytes(MIB // 2)
    async with asyncio.TaskGroup() as tasks:
        calls = [tasks.create_task(collect(channel, "test.sink", data)) for _ in range(150)]
    assert {call.result()[0]["bytes"] for call in calls} == {len(data)}


async def test_calls_that_are_given_up_while_the_link_is_full_do_not_confuse_the_rest(channel: Channel) -> None:
    channel._link.pause_writing()
    calls = [asyncio.create_task(channel.call("test.result", size=number)) for number in range(20)]
    await asyncio.sleep(0)
    for call in calls[10:]:
        call.cancel()
    await asyncio.wait(calls[10:])
    channel._link.resume_writing()
    assert [len((await call)["text"]) for call in calls[:10]] == list(range(10))


async def test_one_slow_reader_holds_up_nobody_else(channel: Channel, child: Guest) -> None:
    async with channel.stream("test.source", bytes=64 * MIB) as slow, channel.stream("test.sink", hold=True) as full:
        await slow.recv(1)
        writing = asyncio.create_task(full.send(Frame.DATA, bytes(4 * MIB)))
        result, data, _ = await collect(channel, "test.echo", os.urandom(4 * MIB))
        assert result["bytes"] == len(data[Frame.DATA]) == 4 * MIB
        assert not writing.done()
        while len(slow._stream.inbox) <= 256 << 10:  # its window is wider than yamux's first one
            await channel.call("test.counts")
        assert len(slow._stream.inbox) <= MIB
        await channel.call("test.open")
        await writing


async def test_memory_stays_flat_while_a_quarter_of_a_gibibyte_flows(channel: Channel, child: Guest) -> None:
    size = 128 * MIB

    async def download() -> int:
        total = 0
        async with channel.stream("test.source", bytes=size) as stream:
            while (frame := await stream.recv(64 << 10)) is not None:
                total += len(frame[1]) if frame[0] is Frame.STDOUT else 0
        return total

    async def upload() -> int:
        chunk = bytes(256 << 10)
        async with channel.stream("test.sink") as stream:
            for _ in range(size // len(chunk)):
                await stream.send(Frame.DATA, chunk)
            await stream.send_eof()
            frame = await stream.recv()
        assert frame is not None
        return int(frame[1]["bytes"])

    rss = child.rss_bytes()
    tracemalloc.start(1)
    try:
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(download()), tasks.create_task(upload())]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [call.result() for call in calls] == [size, size]
    assert peak < 8 * MIB
    assert child.rss_bytes() - rss < 8 * MIB


async def test_an_idle_link_is_kept_alive(channel: Channel, monkeypatch: pytest.MonkeyPatch, child: Guest) -> None:
    monkeypatch.setattr(channel_module, "_PING_INTERVAL_S", 0.01)
    monkeypatch.setattr(channel_module, "_PING_TIMEOUT_S", 0.2)
    async with child.channel() as quick:
        pongs: asyncio.Queue[int] = asyncio.Queue()
        quick._link.session.on_pong = pongs.put_nowait
        for _ in range(30):
            await pongs.get()
        assert not quick.lost.done()


async def test_a_close_that_is_cancelled_closes_the_link_and_stays_cancelled() -> None:
    channel = Channel(LinkProtocol())
    closing = asyncio.create_task(channel.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert channel.lost.done()
    assert channel._ping_task.done()
