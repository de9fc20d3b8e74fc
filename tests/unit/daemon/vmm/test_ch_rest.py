"""The REST client against a scripted server, friendly and hostile."""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.common.errors import VmmError
from agent.daemon.vmm.cloud_hypervisor import http
from agent.daemon.vmm.cloud_hypervisor.rest import RestClient

pytestmark = pytest.mark.timeout(30)
NO_CONTENT = b"HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n"


def ok(value: object, status: int = 200) -> bytes:
    body = json.dumps(value).encode()
    return b"HTTP/1.1 %d \r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body


class Server:
    """Reads requests as v53's server does and answers each with `answer`; keeps what it got."""

    def __init__(self, path: Path, answer: Callable[[str], bytes] | bytes) -> None:
        self.path = path
        self.answer = answer if callable(answer) else lambda name: answer
        self.requests: list[tuple[str, str, Any]] = []
        self.files: list[int] = []
        self.busy = 0
        self.most_busy = 0
        self.pieces = 1 << 20
        self.hang = False

    async def serve(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        with sock:
            sock.setblocking(False)
            await asyncio.sleep(0)
            data = b""
            with contextlib.suppress(OSError):
                while b"\r\n\r\n" not in data:
                    data += await self._first(sock) if not data else await loop.sock_recv(sock, 4096)
                head, _, body = data.partition(b"\r\n\r\n")
                lines = head.decode().split("\r\n")
                headers = dict(line.split(": ", 1) for line in lines[1:])
                while len(body) < int(headers.get("Content-Length", "0")):
                    body += await loop.sock_recv(sock, 65536)
                method, target, version = lines[0].split()
                assert version == "HTTP/1.1"
                name = target.removeprefix("/api/v1/")
                self.requests.append((method, name, json.loads(body) if body else None))
                if self.hang:
                    await asyncio.sleep(60)
                answer = self.answer(name)
                self.busy -= 1
                for start in range(0, len(answer), self.pieces):
                    await loop.sock_sendall(sock, answer[start : start + self.pieces])
                    await asyncio.sleep(0)

    async def _first(self, sock: socket.socket) -> bytes:
        ready = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(sock, ready.set)
        await ready.wait()
        loop.remove_reader(sock)
        data, ancillary, _flags, _address = sock.recvmsg(1, socket.CMSG_LEN(16))
        for _level, _kind, packed in ancillary:
            fds = array.array("i")
            fds.frombytes(packed)
            self.files += fds
        return data


@asynccontextmanager
async def serving(path: Path, answer: Callable[[str], bytes] | bytes) -> AsyncIterator[tuple[Server, RestClient]]:
    server = Server(path, answer)
    tasks: set[asyncio.Task[None]] = set()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
        listener.bind(str(path))
        listener.listen()

        async def accept() -> None:
            while True:
                sock, _ = await asyncio.get_running_loop().sock_accept(listener)
                tasks.add(asyncio.create_task(server.serve(sock)))

        accepting = asyncio.create_task(accept())
        try:
            yield server, RestClient(path)
        finally:
            for task in (accepting, *tasks):
                task.cancel()
            await asyncio.gather(accepting, *tasks, return_exceptions=True)
            for fd in server.files:
                os.close(fd)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "api.sock"


async def test_calls_and_their_bodies(path: Path) -> None:
    async with serving(path, NO_CONTENT) as (server, client):
        await client.create({"a": 1})
        await client.boot()
        await client.pause()
        await client.resume()
        await client.power_button()
        await client.snapshot(Path("/dir"))
        await client.resize_disk("disk-a", 7)
        await client.resize(2, None)
        await client.resize(None, 0)
        await client.restore(Path("/dir"), {})
    assert server.requests == [
        ("PUT", "vm.create", {"a": 1}),
        ("PUT", "vm.boot", None),
        ("PUT", "vm.pause", None),
        ("PUT", "vm.resume", None),
        ("PUT", "vm.power-button", None),
        ("PUT", "vm.snapshot", {"destination_url": "file:///dir"}),
        ("PUT", "vm.resize-disk", {"id": "disk-a", "desired_size": 7}),
        ("PUT", "vm.resize", {"desired_vcpus": 2}),
        ("PUT", "vm.resize", {"desired_balloon": 0}),
        (
            "PUT",
            "vm.restore",
            {"source_url": "file:///dir", "prefault": False, "memory_restore_mode": "Copy", "resume": True},
        ),
    ]


@pytest.mark.parametrize("pieces", [1, 7, 1 << 20])
async def test_answers(path: Path, pieces: int) -> None:
    answers = {
        "vmm.ping": {"build_version": "v53.0", "version": "53.0.0", "pid": 1, "features": []},
        "vm.info": {"config": {}, "state": "Running", "memory_actual_size": 1},
        "vm.counters": {"net0": {"rx_bytes": 1, "odd": "x"}, "odd": 1},
    }
    async with serving(path, lambda name: ok(answers[name])) as (server, client):
        server.pieces = pieces
        assert await client.ping() == "53.0.0"
        assert await client.state() == "Running"
        assert await client.counters() == {"net0": {"rx_bytes": 1}}
    assert [method for method, _, _ in server.requests] == ["GET"] * 3


async def test_descriptors_come_with_the_first_byte(path: Path) -> None:
    async with serving(path, NO_CONTENT) as (server, client):
        with Path("/dev/null").open() as one, Path("/dev/zero").open() as two:  # noqa: ASYNC230
            await client.add_net({"id": "net0"}, one.fileno())
            await client.restore(Path("/dir"), {"net0": two.fileno()})
        assert [os.readlink(f"/proc/self/fd/{fd}") for fd in server.files] == ["/dev/null", "/dev/zero"]
    assert server.requests[0] == ("PUT", "vm.add-net", {"id": "net0"})
    assert server.requests[1][2]["net_fds"] == [{"id": "net0", "num_fds": 1}]


async def test_one_request_at_a_time(path: Path) -> None:
    async with serving(path, NO_CONTENT) as (server, client):
        await asyncio.gather(*(client.pause() for _ in range(5)))
    assert (len(server.requests), server.most_busy) == (5, 1)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (ok(["Error from API", "The VM could not boot", "No\n\nStack backtrace:\n 0: x"], 500),
         "refused vm.boot (status 500): Error from API: The VM could not boot: No"),
        (ok(["Not Found"], 404), "refused vm.boot (status 404): Not Found"),
        (b"HTTP/1.1 503\r\nContent-Length: 4\r\n\r\nfull", "refused vm.boot (status 503): full"),
        (b"HTTP/1.1 400 \r\n\r\n", "refused vm.boot (status 400): it gave no reason"),
        (ok({"error": 1}, 400), 'refused vm.boot (status 400): {"error": 1}'),
        (ok([1], 500), "refused vm.boot (status 500): [1]"),
        (ok([], 500), "refused vm.boot (status 500): []"),
        (ok("x" * 5000, 500), 'refused vm.boot (status 500): "' + "x" * 999),
        (b"HTTP/1.1 300 \r\n\r\n", "refused vm.boot (status 300)"),
        (b"HTTP/1.1 500 \r\nContent-Length: 2\r\n\r\n\xff\xfe", "refused vm.boot (status 500): \ufffd\ufffd"),
    ],
)  # fmt: skip
async def test_refusals(path: Path, answer: bytes, text: str) -> None:
    async with serving(path, answer) as (_, client):
        with pytest.raises(VmmError) as caught:
            await client.boot()
    assert caught.value.reason == "VMM_API_REFUSED"
    assert text in caught.value.message
    assert len(caught.value.message) < 1200


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n" + ok({"state": "Paused"}),
        b"HTTP/1.0 200 OK\r\ncontent-length: 18\r\n\r\n" + b'{"state":"Paused"}',
        b'HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"sta\r\nd\r\nte":"Paused"}\r\n0\r\n\r\n',
    ],
)
async def test_other_forms_of_an_answer(path: Path, answer: bytes) -> None:
    async with serving(path, answer) as (server, client):
        server.pieces = 3
        assert await client.state() == "Paused"


async def test_an_answer_may_have_4_mib(path: Path) -> None:
    value = {"state": "x" * ((4 << 20) - len('{"state": ""}'))}
    async with serving(path, lambda name: ok(value)) as (_, client):
        assert len(await client.state()) > 4_000_000
        value["state"] += "x"
        with pytest.raises(VmmError, match="a Content-Length of 4194305"):
            await client.state()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"", "closed"), (b"HTTP/1.1 200 \r\n", "closed"), (b"HTTP/1.1 200 \r\nContent-Length: 9\r\n\r\n{}", "closed"),
        (b"\r\n\r\n", "garbage"), (b"HELO\r\n\r\n", "garbage"), (b"HTTP/1.1 2OO \r\n\r\n", "garbage"),
        (b"HTTP/1.1 99999 \r\n\r\n", "garbage"), (b"HTTP/1.1\r\n\r\n", "garbage"), (b"x" * 100_000, "garbage"),
        (b"HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n", "garbage"),
        (b"HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n", "garbage"),
        (b"HTTP/1.1 200 \r\nContent-Length: 9999999999999\r\n\r\n", "garbage"),
        (b"HTTP/1.1 200 \r\nContent-Length: \xb2\r\n\r\n", "garbage"),
        (b"HTTP/1.1 200 \r\nContent-Length: 1\r\n\r\n{", "garbage"),
        (b"HTTP/1.1 200 \r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}", "garbage"),
        (b"HTTP/1.1 200 \r\nA: \0\r\nContent-Length: 2\r\n\r\n{}", "garbage"),
        (b"HTTP/1.1 100 \r\n\r\n", "closed"), (b"HTTP/1.1 101 \r\n\r\n", "garbage"),
        (b"HTTP/1.1 200 \r\nTransfer-Encoding: gzip\r\n\r\n{}", "garbage"),
        (b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\nz\r\n", "garbage"),
        (b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n" + b"ffff\r\n%s\r\n" % (b"x" * 65535) * 65, "endless"),
        (ok([1]), "garbage"), (ok(None), "garbage"), (NO_CONTENT, "garbage"),
        (b"HTTP/1.1 200 \r\nContent-Length: 20000\r\n\r\n" + b"[" * 20000, "garbage"),
    ],
)  # fmt: skip
async def test_what_is_no_answer(path: Path, answer: bytes, text: str) -> None:
    async with serving(path, answer) as (_, client):
        with pytest.raises(VmmError, match=text) as caught:
            await client.state()
    assert caught.value.reason == "VMM_API_FAILED"


async def test_silence_has_an_end(path: Path) -> None:
    async with serving(path, NO_CONTENT) as (server, client):
        server.hang = True
        with pytest.raises(VmmError, match=r"did not answer vm\.pause within 0\.05 s") as caught:
            await client.call("PUT", "vm.pause", timeout_s=0.05)
        assert caught.value.reason == "VMM_API_TIMEOUT"
        server.hang = False
        await client.pause()


async def test_nobody_there(path: Path) -> None:
    with pytest.raises(VmmError, match="is gone") as caught:
        await RestClient(path).pause()
    assert caught.value.reason == "VMM_API_FAILED"


async def test_a_body_that_the_server_would_refuse_is_not_sent(path: Path) -> None:
    async with serving(path, NO_CONTENT) as (server, client):
        most = http.MAX_BODY_BYTES - len('{"a": ""}')
        await client.create({"a": "x" * most})
        with pytest.raises(VmmError) as caught:
            await client.create({"a": "x" * (most + 1)})
        assert caught.value.reason == "VMM_API_TOO_LARGE"
    assert len(server.requests) == 1
