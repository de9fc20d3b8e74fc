"""Processes of the guest, as real processes of this host: status, output, input, signals, attach."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from agent.common.errors import AgentError, InvalidSpec, InvalidState, NotFound
from agent.daemon.guestlink.channel import Channel
from agent.daemon.guestlink.stream import CallStream
from guest.wire import Frame
from tests.support.guest_child import MIB, Guest, collect

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the guest's server switches users, so it needs root"),
    pytest.mark.timeout(60),
]
Spec = dict[str, Any]


def spec(*argv: str, **fields: Any) -> Spec:
    return {"argv": list(argv), "user": "root", "cwd": "/", **fields}


def shell(script: str, **fields: Any) -> Spec:
    return spec("/bin/sh", "-c", script, **fields)


async def run(channel: Channel, request: Spec, stdin: bytes | None = None) -> tuple[dict[str, Any], bytes, bytes]:
    """Runs a process to its end; returns exit, output and errors."""
    result, data, _ = await collect(channel, "proc.exec", stdin, **request)
    return result["exit"], data.get(Frame.STDOUT, b""), data.get(Frame.STDERR, b"")


@asynccontextmanager
async def running(channel: Channel, request: Spec) -> AsyncIterator[tuple[CallStream, dict[str, Any]]]:
    """A process that is attached; it is hung up at the end."""
    async with channel.stream("proc.exec", **request) as stream:
        frame = await stream.recv()
        assert frame is not None
        yield stream, frame[1]["process"]


async def read_until(stream: CallStream, word: bytes) -> bytes:
    text = b""
    while word not in text:
        frame = await stream.recv()
        assert frame is not None
        assert frame[0] in (Frame.STDOUT, Frame.STDERR), (frame, text)
        text += frame[1]
    return text


async def exit_of(stream: CallStream) -> dict[str, Any]:
    while (frame := await stream.recv()) is not None:
        if frame[0] is Frame.RESULT:
            result: dict[str, Any] = frame[1]["exit"]
            return result
    raise AssertionError


async def until_gone(channel: Channel, pid: int) -> None:
    """Waits until the guest has reaped a process that it did not start itself."""
    while os.path.exists(f"/proc/{pid}"):  # noqa: ASYNC240  procfs
        await channel.call("test.counts")


async def test_every_status_of_a_thousand(channel: Channel) -> None:
    places = asyncio.Semaphore(200)

    async def one(number: int) -> None:
        ending = (f"exit {number % 256}", "kill -9 $$", "kill -TERM $$", f"exec sh -c 'exit {number % 7}'")[number % 4]
        async with places:
            ended, output, errors = await run(channel, shell(f"echo out {number}; echo err {number} >&2; {ending}"))
        code = (number % 256, None, None, number % 7)[number % 4]
        signals = (0, signal.SIGKILL, signal.SIGTERM, 0)[number % 4]
        assert (ended["code"], ended["signal"], ended["oom"]) == (code, signals, False)
        assert (output, errors) == (f"out {number}\n".encode(), f"err {number}\n".encode())

    async with asyncio.TaskGroup() as tasks:
        for number in range(1000):
            tasks.create_task(one(number))
    assert (await collect(channel, "proc.list"))[2] == []


async def test_output_is_whole_when_the_process_ends_at_once(channel: Channel) -> None:
    for size in (1, 4096, 65536, 3 * MIB + 1):
        ended, output, errors = await run(channel, shell(f"head -c {size} /dev/zero; head -c {size} /dev/zero >&2"))
        assert (ended["code"], len(output), len(errors)) == (0, size, size)


async def test_output_of_children_that_outlive_the_process(channel: Channel) -> None:
    ended, output, _ = await run(channel, shell("sleep 60 & echo $!; exit 5"))
    assert ended["code"] == 5
    os.kill(int(output), signal.SIGKILL)


async def test_input_and_its_end(channel: Channel) -> None:
    data = os.urandom(MIB)
    assert (await run(channel, spec("cat", stdin="pipe"), data))[1] == data
    assert (await run(channel, spec("cat")))[1] == b""
    ended, output, _ = await run(channel, shell("exec 0<&-; sleep 0; echo done", stdin="pipe"), data)
    assert (ended["code"], output) == (0, b"done\n")


async def test_input_for_a_process_that_does_not_read_waits(channel: Channel) -> None:
    async with running(channel, shell("read -r line; echo got $line; sleep 60", stdin="pipe")) as (stream, _):
        writing = asyncio.create_task(stream.send(Frame.DATA, b"a\n" + bytes(4 * MIB)))
        assert await read_until(stream, b"\n") == b"got a\n"
        assert (await run(channel, shell("echo quick")))[1] == b"quick\n"
        assert not writing.done()
        writing.cancel()


async def test_a_terminal_and_its_size(channel: Channel) -> None:
    # The trap stands before the first output, and the read ends now and then, since a signal just before it would wait;
    # on a loaded host it ends within a line, too.
    read = 'if read -r -t 0.2 part; then echo "[$line$part]"; line=; else line=$line$part; fi'
    loop = f"trap 'stty size' WINCH; stty size; tty; while :; do {read}; done"
    request = {**shell("", tty={"rows": 30, "cols": 100, "term": "vt100"}), "argv": ["bash", "-c", loop]}
    async with running(channel, request) as (stream, process):
        assert process["tty"] is True
        assert b"30 100\r\n/dev/pts/" in await read_until(stream, b"/dev/pts/")
        await stream.send_json({"resize": {"rows": 41, "cols": 7}})
        await read_until(stream, b"41 7\r\n")
        await channel.call("proc.resize", id=process["id"], rows=50, cols=60)
        await read_until(stream, b"50 60\r\n")
        await stream.send(Frame.DATA, b"word\n")
        assert b"word\r\n[word]\r\n" in await read_until(stream, b"[word]\r\n")
        await stream.send(Frame.DATA, b"\x03")
        assert (await exit_of(stream))["signal"] == signal.SIGINT
    ended, output, _ = await run(channel, shell("cat; echo $TERM", tty={"rows": 1, "cols": 1, "term": "vt100"}), b"x\n")
    assert (ended["code"], output) == (0, b"x\r\nx\r\nvt100\r\n")
    with pytest.raises(InvalidSpec):
        await run(channel, shell("true", tty={"rows": 0, "cols": 1}))


async def test_all_output_of_a_terminal_arrives(channel: Channel) -> None:
    for _ in range(20):
        _, output, _ = await run(channel, shell("seq 2000", tty={"rows": 9, "cols": 9}))
        assert output == b"".join(b"%d\r\n" % number for number in range(1, 2001))


async def test_signals_reach_the_whole_group(channel: Channel) -> None:
    process = await channel.call("proc.start", **shell("sleep 60 & echo $!; wait"))
    async with channel.stream("proc.attach", id=process["id"]) as stream:
        await stream.recv()
        sleeper = int(await read_until(stream, b"\n"))
        await channel.call("proc.signal", id=process["id"], signal="TERM")
        assert (await exit_of(stream))["signal_name"] == "SIGTERM"
    await until_gone(channel, sleeper)
    for op, fields in (("signal", {"signal": "TERM"}), ("resize", {"rows": 1, "cols": 1})):
        with pytest.raises(InvalidState) as caught:
            await channel.call(f"proc.{op}", id=process["id"], **fields)
        assert caught.value.reason == ("PROCESS_EXITED" if op == "signal" else "NO_TERMINAL")


@pytest.mark.parametrize(("word", "number"), [("SIGUSR1", 10), ("usr1", 10), (10, 10), ("10", 10), (64, 64)])
async def test_names_of_signals(channel: Channel, word: object, number: int) -> None:
    async with running(channel, spec("sleep", "60")) as (stream, _):
        await stream.send_json({"signal": word})
        ended = await exit_of(stream)
        assert ended["signal"] == number
        assert ended["signal_name"] == ("SIGUSR1" if number == 10 else "SIGRTMAX" if number == 64 else "")


@pytest.mark.parametrize("word", ["", "SIGNOPE", 0, -1, 65, "9999", None, [], "SIG_IGN"])
async def test_unknown_signals(channel: Channel, word: object) -> None:
    async with running(channel, spec("sleep", "60")) as (_, process):
        with pytest.raises(InvalidSpec, match="unknown signal"):
            await channel.call("proc.signal", id=process["id"], signal=word)


async def test_a_caller_that_leaves_hangs_the_process_up(channel: Channel) -> None:
    async with running(channel, shell("trap 'exit 9' HUP; echo ready; while :; do sleep 0.05; done")) as (
        stream,
        process,
    ):
        await read_until(stream, b"ready")
    ended = await channel.call("proc.wait", id=process["id"])
    assert ended["exit"]["code"] == 9


async def test_a_link_that_is_lost_hangs_nothing_up(child: Guest) -> None:
    async with child.channel() as channel, running(channel, spec("sleep", "60")) as (_, process):
        await channel.aclose()
    async with child.channel() as channel:
        pages = (await collect(channel, "proc.list"))[2]
        assert [(p["id"], p["exit"]) for page in pages for p in page["processes"]][-1] == (process["id"], None)
        await channel.call("proc.signal", id=process["id"], signal="KILL")
        assert (await channel.call("proc.wait", id=process["id"]))["exit"]["signal"] == 9


async def test_orphans_are_reaped(channel: Channel) -> None:
    _, output, _ = await run(channel, shell("(sleep 0.01 & echo $!) | cat"))
    await until_gone(channel, int(output))


async def test_replay_then_follow_and_a_second_client(channel: Channel) -> None:
    process = await channel.call("proc.start", **shell("echo one; read -r word; echo $word; exit 4", stdin="pipe"))
    async with channel.stream("proc.attach", id=process["id"]) as first:
        await first.recv()
        await read_until(first, b"one\n")
        async with channel.stream("proc.attach", id=process["id"]) as second:
            await second.recv()
            await read_until(second, b"one\n")
            await second.send(Frame.DATA, b"two\n")
            assert await read_until(first, b"\n") == await read_until(second, b"\n") == b"two\n"
            assert [(await exit_of(stream))["code"] for stream in (first, second)] == [4, 4]
    result, data, events = await collect(channel, "proc.attach", id=process["id"])
    assert (result["exit"]["code"], data[Frame.STDOUT], events[0]["dropped"]) == (4, b"one\ntwo\n", 0)
    _, data, _ = await collect(channel, "proc.attach", id=process["id"], replay=False)
    assert data == {}


async def test_what_is_too_old_is_dropped_and_counted(channel: Channel) -> None:
    process = await channel.call("proc.start", **shell("seq 100000", replay=100_000))
    await channel.call("proc.wait", id=process["id"])
    _, data, events = await collect(channel, "proc.attach", id=process["id"])
    whole = b"".join(b"%d\n" % number for number in range(1, 100_001))
    assert events[0]["dropped"] + len(data[Frame.STDOUT]) == len(whole)
    assert whole.endswith(data[Frame.STDOUT])
    assert 50_000 <= len(data[Frame.STDOUT]) <= 100_000


async def test_a_slow_client_holds_the_process_and_loses_nothing(channel: Channel) -> None:
    request = shell("seq 400000; echo end >&2", replay=1000)
    async with running(channel, request) as (stream, process):
        assert (await channel.call("test.open")) == {}
        await stream.recv(1)
        with pytest.raises(AgentError):
            await channel.call("proc.wait", id=process["id"], timeout_s=0.1)
        size, errors = 1, b""
        while (frame := await stream.recv()) is not None:
            size += len(frame[1]) if frame[0] is Frame.STDOUT else 0
            errors += frame[1] if frame[0] is Frame.STDERR else b""
    assert (size, errors) == (sum(len(str(number)) + 1 for number in range(1, 400_001)), b"end\n")


async def test_only_the_latest_exits_are_remembered(channel: Channel) -> None:
    started = [(await channel.call("proc.start", **spec("true")))["id"] for _ in range(30)]
    for number in started:
        assert (await channel.call("proc.wait", id=number))["exit"]["code"] == 0
    with pytest.raises(NotFound):
        await channel.call("proc.wait", id=started[-1] + 1)
    for wrong in (None, "1", -1, 1.5, True if started[0] != 1 else None):
        with pytest.raises(NotFound):
            await channel.call("proc.attach", id=wrong)
