"""The multiplexer against the reference implementation, hashicorp/yamux in Go, in both roles.

The peer is tests/support/interop/yamux_peer.go;
Debian's packages golang-go and golang-github-hashicorp-yamux-dev build it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.daemon.guestlink.protocol import LinkProtocol, set_callbacks
from guest.yamux import Stream, YamuxError, YamuxSession

pytestmark = pytest.mark.timeout(30)
SOURCE = Path(__file__).parents[2] / "support" / "interop" / "yamux_peer.go"
GOPATH = Path("/usr/share/gocode")
MIB = 1 << 20
BULK_BYTES = 64 * MIB


@pytest.fixture(scope="session")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The peer, built once."""
    # Debian's own comes with a compiled standard library: it takes 2 s where another takes 30.
    go = shutil.which("go", path="/usr/bin") or shutil.which("go")
    if go is None or not (GOPATH / "src/github.com/hashicorp/yamux").exists():
        pytest.skip("needs Go and its yamux: apt-get install golang-go golang-github-hashicorp-yamux-dev")
    binary = tmp_path_factory.mktemp("go") / "yamux_peer"
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: text for name, text in os.environ.items() if name != "GOROOT"} | {
            "GO111MODULE": "off", "GOPATH": str(GOPATH), "GOFLAGS": "", "GOCACHE": cache, "GOTOOLCHAIN": "local",
        }  # fmt: skip
        subprocess.run([go, "build", "-o", binary, SOURCE], env=environment, check=True)
    return binary


@pytest.fixture
def socket_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory) / "peer.sock"


class EchoServer(asyncio.Protocol):
    """Our session as the server: sends back what it gets; a stream that says RESET is reset."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.session = YamuxSession(client=False, write=transport.write, on_stream=self.accept)

    def data_received(self, data: bytes) -> None:
        self.session.feed(data)

    def accept(self, stream: Stream) -> None:
        set_callbacks(stream, lambda: self.echo(stream))

    def echo(self, stream: Stream) -> None:
        if stream.inbox.startswith(b"RESET"):
            stream.reset()
        if stream.was_reset or stream.local_closed:
            return
        size = min(len(stream.inbox), stream.send_credit)
        if size:
            stream.send(bytes(stream.inbox[:size]))
            stream.consume(size)
        if stream.remote_closed and not stream.inbox:
            stream.close()


@pytest.mark.parametrize("scenario", ["bulk", "many", "ping", "reset", "late"])
async def test_the_reference_as_client(peer: Path, socket_path: Path, scenario: str) -> None:
    ends: list[EchoServer] = []

    def make() -> EchoServer:
        ends.append(EchoServer())
        return ends[-1]

    server = await asyncio.get_running_loop().create_unix_server(make, socket_path)
    async with server:
        child = await asyncio.create_subprocess_exec(
            peer, "client", socket_path, scenario, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await child.communicate()
    assert (child.returncode, output) == (0, b"")


class Caller:
    """Our session as the client, on the protocol that the agent uses."""

    def __init__(self, link: LinkProtocol) -> None:
        self.link = link

    def open(self, first: bytes) -> Talk:
        talk = Talk(self.link, self.link.session.open())
        talk.stream.send(first)
        return talk

    async def ask(self, question: bytes) -> bytes:
        talk = self.open(question[:1])
        await talk.write(question[1:])
        talk.stream.close()
        return await talk.read()


class Talk:
    """One stream, awaitable."""

    def __init__(self, link: LinkProtocol, stream: Stream) -> None:
        self.stream = stream
        self._link = link
        self._changed = asyncio.Event()
        set_callbacks(stream, self._changed.set)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert not self.stream.was_reset
            self._changed.clear()
            await self._changed.wait()

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            await self.until(lambda: self.stream.send_credit > 0)
            await self._link.drained()
            size = min(len(view), self.stream.send_credit)
            self.stream.send(view[:size])
            view = view[size:]

    async def read(self) -> bytes:
        data = bytearray()
        while True:
            await self.until(lambda: bool(self.stream.inbox) or self.stream.remote_closed)
            data += self.stream.inbox
            self.stream.consume(len(self.stream.inbox))
            if self.stream.remote_closed:
                return bytes(data)


@asynccontextmanager
async def reference_as_server(peer: Path, path: Path) -> AsyncIterator[Caller]:
    links: asyncio.Queue[LinkProtocol] = asyncio.Queue()

    class Link(LinkProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            links.put_nowait(self)

    async with await asyncio.get_running_loop().create_unix_server(Link, path):
        child = await asyncio.create_subprocess_exec(peer, "server", path)
        try:
            link = await links.get()
            yield Caller(link)
            assert not link.lost.done()
            link.fail("the test is over")
            assert await child.wait() == 0
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()


@pytest.fixture
async def caller(peer: Path, socket_path: Path) -> AsyncIterator[Caller]:
    async with reference_as_server(peer, socket_path) as caller:
        yield caller


def digest(data: bytes) -> bytes:
    return len(data).to_bytes(8, "big") + hashlib.sha256(data).digest()


async def test_bulk_each_way(caller: Caller) -> None:
    data = os.urandom(MIB) * 64
    up = caller.open(b"d")
    down = caller.open(b"n" + BULK_BYTES.to_bytes(8, "big"))
    down.stream.widen(MIB)
    down.stream.close()
    async with asyncio.TaskGroup() as tasks:
        received = tasks.create_task(down.read())
        await up.write(data)
        up.stream.close()
    assert await up.read() == digest(data)
    assert received.result() == b"0123456789abcdef" * (BULK_BYTES // 16)
    assert not caller.link.session.streams


async def test_many_streams_at_once(caller: Caller) -> None:
    texts = [os.urandom(number * 997) for number in range(200)]
    async with asyncio.TaskGroup() as tasks:
        answers = [tasks.create_task(caller.ask(b"e" + text)) for text in texts]
    assert [answer.result() for answer in answers] == texts


async def test_half_close_and_window_of_a_reader_that_waits(caller: Caller) -> None:
    slow = caller.open(b"w")
    data = os.urandom(2 * MIB)
    writing = asyncio.create_task(slow.write(data))
    assert await caller.ask(b"ehello") == b"hello"
    assert slow.stream.send_credit == 0
    assert not writing.done()
    await caller.ask(b"g")
    await writing
    slow.stream.close()
    assert await slow.read() == digest(data)


async def test_reset_by_us(caller: Caller) -> None:
    doomed = caller.open(b"r")
    await doomed.write(bytes(MIB))
    doomed.stream.reset()
    assert await caller.ask(b"q") == b"connection reset"
    assert await caller.ask(b"estill here") == b"still here"


async def test_a_stream_reset_before_its_first_frame(caller: Caller) -> None:
    caller.link.session.open().reset()
    assert await caller.ask(b"enext") == b"next"


async def test_pings_both_ways(caller: Caller) -> None:
    pongs: asyncio.Queue[int] = asyncio.Queue()
    caller.link.session.on_pong = pongs.put_nowait
    caller.link.session.ping(77)
    assert await pongs.get() == 77
    assert await caller.ask(b"p") == b"pong"


async def test_go_away(caller: Caller) -> None:
    await caller.ask(b"a")
    with pytest.raises(YamuxError, match="no more streams"):
        caller.open(b"e")
