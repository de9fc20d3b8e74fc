"""The serial console: bounded on disk, whatever the guest prints."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.daemon.vmm.console import Console

pytestmark = pytest.mark.timeout(30)


def sizes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in directory.iterdir()}


@asynccontextmanager
async def attached(directory: Path, limit: int) -> AsyncIterator[tuple[Console, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    console = Console(directory, limit)
    console.attach(ours)
    with theirs:
        try:
            yield console, theirs
        finally:
            with contextlib.suppress(OSError):
                theirs.shutdown(socket.SHUT_RDWR)
            await console.aclose()


async def test_what_is_printed_is_in_the_tail(tmp_path: Path) -> None:
    async with attached(tmp_path, 1000) as (console, guest):
        guest.send(b"Linux version 6\n")
        await console.grown.wait()
        assert console.tail(1000) == b"Linux version 6\n"
        assert console.tail(2) == b"6\n"
        assert console.tail(0) == b""
        guest.send(b"last words")
    assert console.tail(1000) == b"Linux version 6\nlast words"


async def test_a_guest_that_prints_for_ever_fills_no_disk(tmp_path: Path) -> None:
    limit = 256 << 10
    async with attached(tmp_path, limit) as (_, guest):
        loop = asyncio.get_running_loop()
        for _ in range(64):
            await loop.sock_sendall(guest, b"0123456789abcdef" * 4096)
            assert sum(sizes(tmp_path).values()) <= limit
    assert sizes(tmp_path).keys() == {"console.log", "console.log.1"}


async def test_an_earlier_log_goes_on_and_still_counts(tmp_path: Path) -> None:
    (tmp_path / "console.log").write_bytes(b"a" * 60)
    async with attached(tmp_path, 100) as (console, guest):
        guest.send(b"b" * 10)
        await console.grown.wait()
        assert console.tail(1000) == b"a" * 60 + b"b" * 10
    assert sizes(tmp_path) == {"console.log": 10, "console.log.1": 60}


async def test_closing_does_not_wait_for_a_guest_that_goes_on(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    console = Console(tmp_path, 1000)
    console.attach(ours)
    with theirs:
        theirs.send(b"before")
        await console.grown.wait()
        await console.aclose(timeout_s=0.01)
        await console.aclose(timeout_s=0.01)
        assert console.tail(100) == b"before"
        assert ours.fileno() == -1


async def test_closing_without_a_guest(tmp_path: Path) -> None:
    console = Console(tmp_path, 1000)
    await console.aclose()
    await console.aclose()
    assert console.tail(10) == b""


async def test_files_that_are_gone(tmp_path: Path) -> None:
    console = Console(tmp_path, 1000)
    (tmp_path / "console.log").unlink()
    assert console.tail(10) == b""
    await console.aclose()


async def test_a_directory_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Console(tmp_path / "none", 10)


async def test_a_failed_write_does_not_end_the_log(tmp_path: Path) -> None:
    obstacle = tmp_path / "console.log.1"
    obstacle.mkdir()  # the log cannot take its place
    async with attached(tmp_path, 20) as (console, guest):
        for text in (b"before;", b"is lost"):
            guest.send(text)
            await console.grown.wait()
            console.grown.clear()
        obstacle.rmdir()
        guest.send(b"after")
        await console.grown.wait()
        assert console.tail(100) == b"before;after"
