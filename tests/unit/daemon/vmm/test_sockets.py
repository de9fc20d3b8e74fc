"""Sockets to a VMM: made before it starts, and the CONNECT handshake with servers of every kind."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.common.errors import GuestUnreachable, VmmError
from agent.daemon.vmm import sockets

pytestmark = pytest.mark.timeout(30)
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.sock"


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@asynccontextmanager
async def server(path: Path, serve: Serve) -> AsyncIterator[None]:
    tasks: list[asyncio.Task[None]] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        try:
            await serve(reader, writer)
        except OSError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_unix_server(connected, path):
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)


async def test_a_connection_can_be_made_before_anybody_accepts(path: Path) -> None:
    with sockets.listen(path) as listener:
        sock = await sockets.connect(path)
        with sock, listener.accept()[0] as accepted:
            assert not sock.getblocking()
            assert not sock.get_inheritable()
            sock.send(b"hello")
            assert accepted.recv(9) == b"hello"


def test_a_stale_socket_is_replaced(path: Path) -> None:
    sockets.listen(path).close()
    sockets.listen(path).close()
    path.unlink()
    path.write_text("a file")
    sockets.listen(path).close()


def test_a_path_that_is_too_long_says_what_to_do(tmp_path: Path) -> None:
    longest = tmp_path / ("x" * (106 - len(str(tmp_path))))
    sockets.listen(longest).close()
    with pytest.raises(VmmError, match="choose a shorter"):
        sockets.listen(tmp_path / ("x" * (107 - len(str(tmp_path)))))
    with pytest.raises(VmmError):
        sockets.listen(tmp_path / ("\u00e4" * 60))


def test_a_directory_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        sockets.listen(tmp_path / "none" / "s.sock")


async def test_nobody_listens(path: Path) -> None:
    with pytest.raises(GuestUnreachable, match=r"s\.sock does not answer"):
        await sockets.connect(path)
    sockets.listen(path).close()
    with pytest.raises(GuestUnreachable, match=r"s\.sock does not answer"):
        await sockets.connect(path)


async def test_a_queue_that_is_full_is_no_connection(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        with await sockets.connect(path), pytest.raises(GuestUnreachable):
            (await sockets.connect(path)).close()


# -- CONNECT -----------------------------------------------------------------------------------------------------------


async def test_the_handshake_takes_its_line_and_no_more(path: Path) -> None:
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        for byte in b"OK 1073741824\nlink":
            writer.write(bytes([byte]))
            await writer.drain()
        await reader.read()

    async with server(path, serve):
        with await sockets.connect_vsock(path, 1024) as sock:
            loop, data = asyncio.get_running_loop(), b""
            while len(data) < 4:
                data += await loop.sock_recv(sock, 100)
        assert (asked, data) == ([b"CONNECT 1024\n"], b"link")


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"OK 1", b"\n", b"OK\n", b"NO 5\n", b"ERR refused\n", b"ok 5\n", b"\0" * 64, b"\xff\n",
        b"OK " + b"1" * 5000 + b"\n",
    ],
)  # fmt: skip
async def test_hostile_answers(path: Path, answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(answer)
        await writer.drain()

    async with server(path, serve):
        with pytest.raises(GuestUnreachable) as caught:
            await sockets.connect_vsock(path, 1)
    assert len(caught.value.message) < 500


async def test_an_answer_that_does_not_end(path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"x" * 1000)
            await writer.drain()

    async with server(path, serve):
        with pytest.raises(GuestUnreachable, match="refused"):
            await sockets.connect_vsock(path, 1)


async def test_a_hang_up_at_once(path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with server(path, serve):
        with pytest.raises(GuestUnreachable):
            await sockets.connect_vsock(path, 1)


async def test_silence_has_a_deadline_and_cancellation_closes(path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with server(path, serve):
        with pytest.raises(GuestUnreachable, match="handshake failed"):
            await sockets.connect_vsock(path, 1, timeout_s=0.02)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await sockets.connect_vsock(path, 1)
