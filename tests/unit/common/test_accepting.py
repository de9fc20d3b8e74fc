"""Accepting goes on after the process was out of descriptors, for each kind of listener that there is."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from agent.common import accepting
from agent.common.accepting import Acceptor
from agent.common.background import Supervisor
from agent.common.policy.policy import Policy
from agent.daemon.rpc.auth.peercred import PeerSocket
from agent.egress.control import Control
from agent.egress.control_protocol import ControlLink
from agent.egress.dns.server import DnsServer
from agent.egress.report import Reporter
from agent.egress.sandbox_state import SandboxState
from agent.egress.stderr_log import LoopLog
from agent.egress.tcp.proxy import TcpProxy


class Exhausted(socket.socket):
    """A listener whose accept fails with these numbers of errno first."""

    faults: list[int]
    calls: int

    def accept(self) -> tuple[socket.socket, Any]:
        self.calls += 1
        if self.faults:
            number = self.faults.pop(0)
            raise OSError(number, os.strerror(number))
        return super().accept()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Exhausted]:
    with Exhausted(socket.AF_UNIX) as made:
        made.faults, made.calls = [errno.EMFILE, errno.ENFILE], 0
        made.bind(str(tmp_path / "s"))
        made.listen()
        yield made


def connect(listener: socket.socket) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(0)
    client.connect(listener.getsockname())
    return client


async def received(client: socket.socket) -> bytes:
    async with asyncio.timeout(10):
        return await asyncio.get_running_loop().sock_recv(client, 100)


async def test_it_waits_without_spinning_and_goes_on(listener: Exhausted) -> None:
    failures: list[OSError] = []

    def take(client: socket.socket) -> None:
        client.send(b"hello")
        client.close()

    acceptor = Acceptor(listener, take, failures.append)
    for _ in range(2):
        with connect(listener) as client:
            assert await received(client) == b"hello"
    acceptor.close()
    acceptor.close()
    assert [error.errno for error in failures] == [errno.EMFILE]  # once, until accept works again
    assert listener.calls <= 2 + 2 * 2  # two failures; per connection, it and BlockingIOError


async def test_a_client_that_gave_up_delays_nobody(listener: Exhausted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accepting, "_PAUSE_S", 60)
    listener.faults = [errno.ECONNABORTED]
    taken: list[socket.socket] = []
    acceptor = Acceptor(listener, taken.append, lambda _: pytest.fail("reported"))
    with connect(listener):
        async with asyncio.timeout(10):
            while not taken:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    acceptor.close()
    taken[0].close()


async def test_a_connection_that_cannot_be_taken_costs_no_other(listener: Exhausted) -> None:
    listener.faults = []
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))

    def take(client: socket.socket) -> None:
        if not problems:
            raise RuntimeError("no luck")
        client.send(b"hello")
        client.close()

    acceptor = Acceptor(listener, take, lambda _: pytest.fail("reported"))
    with connect(listener) as first, connect(listener) as second:
        assert await received(first) == b""
        assert await received(second) == b"hello"
    acceptor.close()
    assert [str(problem["exception"]) for problem in problems] == ["no luck"]


async def test_none_is_accepted_after_close_even_in_a_pause(
    listener: Exhausted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "_PAUSE_S", 0.02)
    failed = asyncio.Event()
    acceptor = Acceptor(listener, lambda _: pytest.fail("taken"), lambda _: failed.set())
    with connect(listener):
        await asyncio.wait_for(failed.wait(), 10)
        acceptor.close()
        calls = listener.calls
        await asyncio.sleep(0.1)
        assert listener.calls == calls


# -- each user of it ---------------------------------------------------------------------------------------------------


async def test_the_control_socket(listener: Exhausted) -> None:
    def servers(_: SandboxState) -> Any:
        raise AssertionError

    control = Control(servers, {"settings": "x"}, os.getuid(), Supervisor(LoopLog()))
    running = asyncio.create_task(control.run(listener))
    link = ControlLink(connect(listener))
    await link.send({"seq": 1, "op": "hello"})
    async with asyncio.timeout(10):
        assert (await link.receive())[0]["result"]["sandboxes"] == {}
        link.close()
        await running
    assert listener.faults == []


async def test_the_socket_of_the_api(listener: Exhausted, tmp_path: Path) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(4))
        writer.close()

    inner = await asyncio.start_unix_server(echo, tmp_path / "private")
    peers = PeerSocket(tmp_path / "public", tmp_path / "private", {os.getuid()}, set())
    await peers.start(listener)
    with connect(listener) as client:
        client.send(b"ping")
        assert await received(client) == b"ping"
    await peers.aclose()
    inner.close()


@pytest.mark.parametrize("kind", ["dns", "tcp"])
async def test_the_servers_of_a_sandbox(kind: str) -> None:
    """Before, the DNS server spun as long as there were no descriptors."""
    sandbox = SandboxState("sbx-1", Policy(), Reporter())
    with Exhausted(socket.AF_INET) as listener, socket.socket() as client:
        listener.faults, listener.calls = [errno.EMFILE] * 2, 0
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server: Any
        if kind == "dns":
            server = DnsServer(sandbox, cast(Any, None))
            server.start([], [listener])
        else:
            server = TcpProxy(sandbox, cast(Any, None))
            server.start([listener])
            server._take = lambda sock, *_: sock.close()
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, listener.getsockname())
        if kind == "dns":
            await loop.sock_sendall(client, b"\0\1x")  # malformed: answered by the end of the connection
        assert await received(client) == b""
        assert listener.calls <= 4
        await server.aclose()
