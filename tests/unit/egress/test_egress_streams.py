"""Splicing between sockets, the control link with its descriptors, and the process's table of sandboxes."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from agent.common.background import Supervisor
from agent.common.policy.policy import Policy
from agent.common.policy.reasons import Reason
from agent.common.policy.rules import parse_rules
from agent.egress.control import Control
from agent.egress.control_protocol import MAX_MESSAGE_BYTES, ControlLink, LinkClosed
from agent.egress.report import MAX_DENIALS, Reporter
from agent.egress.sandbox_state import SandboxState
from agent.egress.stderr_log import LoopLog
from agent.egress.transport.splice import SpliceRelay


def pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    for sock in (one, other):
        sock.setblocking(False)
    return one, other


@pytest.fixture
async def splice_relay() -> AsyncIterator[SpliceRelay]:
    made = SpliceRelay()
    made.start()
    yield made
    made.stop()


async def received(sock: socket.socket) -> bytes:
    loop, data = asyncio.get_running_loop(), b""
    while piece := await loop.sock_recv(sock, 1 << 16):
        data += piece
    return data


async def test_both_directions_and_each_end_by_itself(splice_relay: SpliceRelay) -> None:
    loop = asyncio.get_running_loop()
    (a, b), (c, d) = pair(), pair()
    relayed = splice_relay.relay(b, c)
    data = os.urandom(5 << 20)
    sending = asyncio.create_task(loop.sock_sendall(a, data))
    reading = asyncio.create_task(received(d))
    await sending
    a.shutdown(socket.SHUT_WR)
    assert await reading == data
    assert not relayed.done.done()  # the other direction goes on
    await loop.sock_sendall(d, b"answer")
    d.close()
    assert await received(a) == b"answer"
    async with asyncio.timeout(5):
        await relayed.done
    a.close()


async def test_a_reader_that_does_not_read_stops_its_writer_alone(splice_relay: SpliceRelay) -> None:
    loop = asyncio.get_running_loop()
    (a, b), (c, d) = pair(), pair()
    (e, f), (g, h) = pair(), pair()
    stuck, free = splice_relay.relay(b, c), splice_relay.relay(f, g)
    sending = asyncio.create_task(loop.sock_sendall(a, bytes(64 << 20)))
    _, stuck_still = await asyncio.wait({sending}, timeout=1.5)
    assert stuck_still
    await loop.sock_sendall(e, b"hello")
    assert await loop.sock_recv(h, 10) == b"hello"
    await loop.sock_sendall(d, b"back")  # against the stream
    assert await loop.sock_recv(a, 10) == b"back"
    for relayed in (stuck, free):
        relayed.abort()
        relayed.abort()
        async with asyncio.timeout(5):
            await relayed.done
    with pytest.raises(ConnectionResetError):
        await loop.sock_recv(h, 10)
    with pytest.raises(ConnectionResetError):
        await sending
    for sock in (a, d, e, h):
        sock.close()


async def test_a_reset_is_passed_on(splice_relay: SpliceRelay) -> None:
    (a, b), (c, d) = pair(), pair()
    relayed = splice_relay.relay(b, c)
    await asyncio.get_running_loop().sock_sendall(a, b"x")
    assert await asyncio.get_running_loop().sock_recv(d, 10) == b"x"
    a.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    a.close()
    async with asyncio.timeout(5):
        await relayed.done
    with pytest.raises(ConnectionResetError):
        await asyncio.get_running_loop().sock_recv(d, 10)
    d.close()


async def test_idle_connections_hold_no_pipes(splice_relay: SpliceRelay) -> None:
    before = len(os.listdir("/proc/self/fd"))
    ends = [(pair(), pair()) for _ in range(50)]
    relayed = [splice_relay.relay(one[1], two[0]) for one, two in ends]
    loop = asyncio.get_running_loop()
    for one, two in ends:
        await loop.sock_sendall(one[0], b"x")
        await loop.sock_recv(two[1], 1)
    assert len(os.listdir("/proc/self/fd")) - before <= 50 * 4 + 20
    for item in relayed:
        item.abort()
    await asyncio.gather(*(item.done for item in relayed))
    for one, two in ends:
        one[0].close()
        two[1].close()


class FullEpoll:
    """An epoll that is out of watches or memory (epoll_ctl(2), ENOSPC) at the given registrations, from 0."""

    def __init__(self, inner: select.epoll, full_at: set[int]) -> None:
        self._inner = inner
        self._full_at = full_at
        self._count = -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def register(self, number: int, events: int) -> None:
        self._count += 1
        if self._count in self._full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._inner.register(number, events)


@pytest.mark.parametrize("full_at", [0, 1])
async def test_a_pair_that_cannot_be_watched_is_reset_and_others_go_on(splice_relay: SpliceRelay, full_at: int) -> None:
    loop = asyncio.get_running_loop()
    splice_relay._poll = FullEpoll(splice_relay._poll, {full_at})  # type: ignore[assignment]
    (a, b), (c, d) = pair(), pair()
    (e, f), (g, h) = pair(), pair()
    async with asyncio.timeout(5):
        await splice_relay.relay(b, c).done
        for sock in (a, d):
            with pytest.raises(ConnectionResetError):
                await loop.sock_recv(sock, 10)
        relayed = splice_relay.relay(f, g)
        await loop.sock_sendall(e, b"hello")
        assert await loop.sock_recv(h, 10) == b"hello"
        relayed.abort()
        await relayed.done
    for sock in (a, d, e, h):
        sock.close()


# -- the control link --------------------------------------------------------------------------------------------------


def links() -> tuple[ControlLink, ControlLink, socket.socket]:
    one, other = socket.socketpair()
    return ControlLink(one), ControlLink(other), one


async def test_messages_and_descriptors_arrive_together() -> None:
    one, other, _ = links()
    read, write = os.pipe()
    big = {"text": "x" * 2_000_000}
    sending = asyncio.create_task(one.send({"n": 1}, [write]))
    sending_big = asyncio.create_task(one.send(big))
    message, fds = await other.receive()
    assert (message, len(fds)) == ({"n": 1}, 1)
    os.write(fds[0], b"through")
    assert os.read(read, 10) == b"through"
    assert await other.receive() == (big, [])
    await asyncio.gather(sending, sending_big)
    one.close()
    with pytest.raises(LinkClosed):
        await other.receive()
    other.close()
    for fd in (read, write, fds[0]):
        os.close(fd)


@pytest.mark.parametrize("direction", ["receive", "send"])
async def test_a_link_that_is_closed_ends_the_wait_of_another_task(direction: str) -> None:
    loop = asyncio.get_running_loop()
    one, other, raw = links()
    number = raw.fileno()
    waiting: asyncio.Task[Any] = asyncio.create_task(
        one.receive() if direction == "receive" else one.send({"text": "x" * 2_000_000})
    )
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    one.close()
    async with asyncio.timeout(5):
        with pytest.raises(LinkClosed):
            await waiting
    # The next socket of this number must not find registrations of the old one.
    assert not loop.remove_reader(number)
    assert not loop.remove_writer(number)
    other.close()


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\0\0\0\2[]", b"\0\0\0\3{x}"])
async def test_nonsense_ends_the_link(data: bytes) -> None:
    one, other, raw = links()
    assert len(data) < MAX_MESSAGE_BYTES
    await asyncio.get_running_loop().sock_sendall(raw, data)
    with pytest.raises(LinkClosed):
        await other.receive()
    one.close()
    other.close()


class FakeServer:
    def __init__(self, sandbox: SandboxState) -> None:
        self.sandbox = sandbox
        self.sockets: list[socket.socket] = []

    def start(self, *sockets: list[socket.socket]) -> None:
        self.sockets = [sock for group in sockets for sock in group]

    async def aclose(self) -> None:
        for sock in self.sockets:
            sock.close()


async def test_the_process_does_what_it_is_told_and_ends_when_nobody_needs_it(tmp_path: Any) -> None:
    made: list[SandboxState] = []

    def servers(sandbox: SandboxState) -> Any:
        made.append(sandbox)
        return FakeServer(sandbox), FakeServer(sandbox)

    path = str(tmp_path / "s")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    supervisor = Supervisor(LoopLog())
    running = asyncio.create_task(Control(servers, {"settings": "x"}, os.getuid(), supervisor).run(listener))
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    link = ControlLink(client)

    async def call(fds: tuple[int, ...] = (), **message: Any) -> dict[str, Any]:
        await link.send({"seq": 1, **message}, fds)
        while "seq" not in (answer := (await link.receive())[0]):
            pass
        return answer

    policy = Policy(allow=parse_rules(["a.example"], "x")).to_json()
    order: dict[str, Any] = {
        "op": "assign",
        "sandbox": "sbx-1",
        "digest": "d",
        "policy": policy,
        "secrets": [],
        "ca": None,
    }
    with socket.socket() as sock:
        answer = await call((sock.fileno(),), **order, sockets=["tcp4"])
    assert answer["result"] == {"ended": 0}
    assert (await call(op="hello"))["result"]["sandboxes"] == {"sbx-1": "d"}
    assert "do not match" in (await call(**order, sockets=["tcp4"]))["error"]
    assert "unknown operation" in (await call(op="dance"))["error"]
    made[-1].deny(Reason.HOST_NOT_ALLOWED, "evil\n.example", 443, "tls")
    report, _ = await link.receive()
    assert report["counts"] == [["sbx-1", "host_not_allowed", 1]]
    assert report["denials"] == [["sbx-1", "host_not_allowed", "evil?.example", 443, "tls", 1]]
    await call(op="remove", sandbox="sbx-1")
    link.close()
    async with asyncio.timeout(5):
        await running
    listener.close()


async def test_a_link_that_takes_over_ends_the_one_before_and_its_task(tmp_path: Any) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        control = Control(lambda _: pytest.fail("made"), {"settings": "x"}, os.getuid(), Supervisor(LoopLog()))
        running = asyncio.create_task(control.run(listener))
        held: list[ControlLink] = []
        async with asyncio.timeout(10):
            for _ in range(5):
                client = socket.socket(socket.AF_UNIX)
                client.connect(path)
                link = ControlLink(client)
                await link.send({"seq": 1, "op": "hello"})
                assert (await link.receive())[0]["result"]["sandboxes"] == {}
                assert len(control._serving) <= 2
                held.append(link)
            for link in held[:-1]:
                with pytest.raises(LinkClosed):
                    await link.receive()
            assert len(control._serving) == 1
            for link in held:
                link.close()
            await running


def test_reports_count_all_and_detail_some() -> None:
    reporter = Reporter()
    for number in range(1000):
        reporter.deny("sbx-1", Reason.HOST_NOT_ALLOWED, f"h{number}", 443, "tls")
    report = reporter.take()
    assert report is not None
    assert report["counts"] == [["sbx-1", "host_not_allowed", 1000]]
    assert len(report["denials"]) == MAX_DENIALS
    assert reporter.take() is None


def test_an_update_ends_what_is_no_longer_allowed() -> None:
    sandbox = SandboxState("sbx-1", Policy(), Reporter())

    class Connection:
        aborted = False

        def __init__(self, name: str) -> None:
            self.name = name

        def recheck(self) -> Reason | None:
            return sandbox.policy.check_name(self.name, 443)

        def abort(self) -> None:
            self.aborted = True

    kept, cut = Connection("a.example"), Connection("b.example")
    sandbox.connections |= {kept, cut}
    assert sandbox.update(Policy(allow=parse_rules(["a.example"], "x")), (), None) == 1
    assert (kept.aborted, cut.aborted) == (False, True)
    assert sandbox.reporter.counts == {("sbx-1", "policy_changed"): 1}
