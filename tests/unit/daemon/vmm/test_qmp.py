"""QEMU's machine protocol against a scripted QEMU."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.common.errors import VmmError
from agent.daemon.vmm.qemu.qmp import Qmp

pytestmark = pytest.mark.timeout(30)
GREETING = b'{"QMP": {"version": {"qemu": {"major": 10}}, "capabilities": ["oob"]}}\n'
Script = Callable[["FakeQemu"], Awaitable[None]]


class FakeQemu:
    """One connection: `asked` is every command so far."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.asked: list[dict[str, Any]] = []

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    def reply(self, request: dict[str, Any], **answer: object) -> None:
        identity = {"id": request["id"]} if "id" in request else {}
        self.say(json.dumps({**answer, **identity}).encode() + b"\r\n")

    async def next(self) -> dict[str, Any]:
        self.asked.append(json.loads(await self.reader.readline()))
        return self.asked[-1]

    async def negotiate(self) -> None:
        self.say(GREETING)
        self.reply(await self.next(), **{"return": {}})


@asynccontextmanager
async def qemu(path: Path, script: Script) -> AsyncIterator[str]:
    """Yields the socket of a QEMU that follows `script` on each connection, then hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await script(FakeQemu(reader, writer))
        except (OSError, ValueError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_unix_server(serve, path):
        yield str(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp.sock"


async def wait_for_hang_up(fake: FakeQemu) -> None:
    await fake.reader.read()


async def test_commands_and_arguments(path: Path) -> None:
    seen: list[dict[str, Any]] = []

    async def script(fake: FakeQemu) -> None:
        await fake.negotiate()
        for answer in ({"status": "running"}, [1, 2], None):
            fake.reply(await fake.next(), **{"return": answer})
        seen.extend(fake.asked)
        await wait_for_hang_up(fake)

    async with qemu(path, script) as socket_path:
        qmp = await Qmp.connect(socket_path)
        assert await qmp.execute("query-status") == {"status": "running"}
        assert await qmp.execute("migrate", uri="file:x", detach_now=True) == [1, 2]
        assert await qmp.execute("cont") is None
        qmp.close()
        qmp.close()
    assert [request["execute"] for request in seen] == ["qmp_capabilities", "query-status", "migrate", "cont"]
    assert seen[2]["arguments"] == {"uri": "file:x", "detach-now": True}
    assert "arguments" not in seen[3]


async def test_events_are_skipped(path: Path) -> None:
    async def script(fake: FakeQemu) -> None:
        await fake.negotiate()
        request = await fake.next()
        fake.say(b'{"event": "STOP", "timestamp": {}}\n{"event": "RESUME"}\n')
        fake.reply(request, **{"return": 1})
        await wait_for_hang_up(fake)

    async with qemu(path, script) as socket_path:
        qmp = await Qmp.connect(socket_path)
        assert await qmp.execute("x") == 1
        qmp.close()


async def test_commands_take_turns(path: Path) -> None:
    async def script(fake: FakeQemu) -> None:
        await fake.negotiate()
        for _ in range(10):
            request = await fake.next()
            fake.reply(request, **{"return": request["execute"]})
        await wait_for_hang_up(fake)

    async with qemu(path, script) as socket_path:
        qmp = await Qmp.connect(socket_path)
        names = [f"command-{number}" for number in range(10)]
        assert await asyncio.gather(*(qmp.execute(name) for name in names)) == names
        qmp.close()


@pytest.mark.parametrize("error", [{"class": "GenericError", "desc": "no such drive"}, {}, None, "text", [1]])
async def test_a_refusal(path: Path, error: object) -> None:
    async def script(fake: FakeQemu) -> None:
        await fake.negotiate()
        fake.reply(await fake.next(), error=error)
        fake.reply(await fake.next(), **{"return": "fine"})
        await wait_for_hang_up(fake)

    async with qemu(path, script) as socket_path:
        qmp = await Qmp.connect(socket_path)
        with pytest.raises(VmmError, match="refused x") as caught:
            await qmp.execute("x")
        assert caught.value.reason == "QMP_REFUSED"
        assert await qmp.execute("y") == "fine"
        qmp.close()


async def test_a_late_answer_is_not_taken_for_that_of_the_next_command(path: Path) -> None:
    async def script(fake: FakeQemu) -> None:
        await fake.negotiate()
        slow, quick = await fake.next(), await fake.next()
        fake.reply(slow, **{"return": "slow"})
        fake.reply(quick, **{"return": "quick"})
        failed, last = await fake.next(), await fake.next()
        fake.reply(failed, error={"desc": "late"})
        fake.reply(last, **{"return": "last"})
        await wait_for_hang_up(fake)

    async with qemu(path, script) as socket_path:
        qmp = await Qmp.connect(socket_path)
        with pytest.raises(VmmError, match=r"slow within 0.02 s") as caught:
            await qmp.execute("slow", timeout_s=0.02)
        assert caught.value.reason == "QMP_TIMEOUT"
        assert await qmp.execute("quick") == "quick"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await qmp.execute("cancelled")
        assert await qmp.execute("last") == "last"
        qmp.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"nonsense\n", b"\xff\xfe\n", b"[]\n", b"7\n", b"[" * 200_000 + b"\n", b"x" * (5 << 20) + b"\n", b"",
        b'{"return"',
    ],
    ids=["words", "no text", "list", "number", "deep", "long", "hang-up", "half a line"],
)  # fmt: skip
@pytest.mark.parametrize("when", ["greeting", "capabilities", "command"])
async def test_garbage(path: Path, garbage: bytes, when: str) -> None:
    async def script(fake: FakeQemu) -> None:
        if when == "command":
            await fake.negotiate()
        elif when == "capabilities":
            fake.say(GREETING)
        if when != "greeting":
            await fake.next()
        fake.say(garbage)
        await fake.writer.drain()

    async with qemu(path, script) as socket_path:
        with pytest.raises(VmmError) as caught:
            await connect_and_ask(socket_path)
        assert caught.value.reason == "QMP_FAILED"


async def connect_and_ask(socket_path: str) -> None:
    qmp = await Qmp.connect(socket_path)
    try:
        await qmp.execute("x")
    finally:
        qmp.close()


async def test_a_greeting_of_something_else(path: Path) -> None:
    async def script(fake: FakeQemu) -> None:
        fake.say(b'{"hello": "world"}\n')
        await wait_for_hang_up(fake)

    async with qemu(path, script) as socket_path:
        with pytest.raises(VmmError, match="no greeting"):
            await Qmp.connect(socket_path)


@pytest.mark.parametrize("greets", [True, False])
async def test_silence(path: Path, greets: bool) -> None:
    async def script(fake: FakeQemu) -> None:
        if greets:
            fake.say(GREETING)
        await wait_for_hang_up(fake)

    async with qemu(path, script) as socket_path:
        with pytest.raises(VmmError, match=r"silent|did not answer qmp_capabilities"):
            await Qmp.connect(socket_path, timeout_s=0.05)


async def test_nobody_listens(path: Path) -> None:
    with pytest.raises(VmmError, match="does not answer") as caught:
        await Qmp.connect(str(path))
    assert caught.value.reason == "QMP_FAILED"
