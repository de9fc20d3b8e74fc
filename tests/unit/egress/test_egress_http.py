"""Opened connections without network: a hand-made client and server on either side of a relay."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from urllib.parse import quote

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest

from agent.common.policy.policy import Policy
from agent.common.policy.reasons import Reason
from agent.common.policy.rules import parse_rules
from agent.common.policy.secret import Secret
from agent.egress.http.h2_endpoint import keep_streams_after_goaway
from agent.egress.http.http1 import Http1Relay
from agent.egress.http.http2 import Http2Relay
from agent.egress.http.request_policy import RequestPolicy, Target
from agent.egress.report import Reporter
from agent.egress.sandbox_state import SandboxState
from agent.egress.transport.byte_streams import Stream
from agent.egress.transport.dial import DialError

HOST = "a.example"
VALUE, MARK = "the-real&value/0123456789", "sbx_secret_ABCDEFGHIJKLMNO"
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Bench:
    """A relay between two ends, as one opened TLS connection to a.example has it."""

    def __init__(self) -> None:
        secret = Secret("KEY", MARK, VALUE, parse_rules([HOST], "x"))
        self.sandbox = SandboxState("sbx-1", Policy(), Reporter(), (secret,))
        self.client: Ends
        self.server: Ends
        self.task: asyncio.Task[None]

    def denied(self) -> dict[str, int]:
        return {reason: count for (_, reason), count in self.sandbox.reporter.counts.items()}


@asynccontextmanager
async def relayed(kind: type[Http1Relay | Http2Relay], fault: DialError | None = None) -> AsyncIterator[Bench]:
    bench = Bench()
    (guest, ours), (theirs, server) = socket.socketpair(), socket.socketpair()
    for sock in (guest, ours, theirs, server):
        sock.setblocking(False)

    async def authorize(host: str) -> None:
        return None

    async def connect() -> Stream:
        if fault is not None:
            raise fault
        return Stream(theirs)

    request_policy = RequestPolicy(bench.sandbox, Target(HOST, 443, ip_address("45.0.0.1"), (), tls=True), authorize)
    bench.client = await asyncio.open_connection(sock=guest)
    bench.server = await asyncio.open_connection(sock=server)
    bench.task = asyncio.create_task(kind(Stream(ours), connect, request_policy).run())
    try:
        yield bench
    finally:
        bench.task.cancel()
        await asyncio.gather(bench.task, return_exceptions=True)
        for _, writer in (bench.client, bench.server):
            writer.close()
        theirs.close()


async def test_http1_injects_into_the_query_alone_and_wants_a_readable_answer() -> None:
    async with relayed(Http1Relay) as bench:
        bench.client[1].write(
            f"GET /{MARK}?k={MARK} HTTP/1.1\r\nHost: {HOST}\r\nAccept-Encoding: gzip\r\n\r\n".encode()
        )
        head = await head_of(bench.server[0])
        assert head.startswith(f"GET /{MARK}?k={quote(VALUE, safe='')} HTTP/1.1\r\n".encode())
        assert b"Accept-Encoding: identity\r\n" in head


async def test_http2_injects_into_the_query_alone_and_wants_a_readable_answer() -> None:
    async with relayed(Http2Relay) as bench:
        client, server = Peer(bench.client, client_side=True), Peer(bench.server, client_side=False)
        headers = [*REQUEST[:3], (":path", f"/{MARK}?k={MARK}"), ("accept-encoding", "gzip")]
        client.h2.send_headers(1, headers, end_stream=True)
        client.flush()
        request = await server.until(kind(h2.events.RequestReceived))
        sent = dict(request.headers)  # type: ignore[attr-defined]
        assert sent[":path"] == f"/{MARK}?k={quote(VALUE, safe='')}"
        assert sent["accept-encoding"] == "identity"


async def head_of(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(5):
        return await reader.readuntil(b"\r\n\r\n")


async def test_requests_and_answers_follow_one_another_with_values_in_and_out() -> None:
    async with relayed(Http1Relay) as bench:
        (reader, writer), (up_reader, up_writer) = bench.client, bench.server
        for body in (b"plain", VALUE.encode() + b"!"):
            writer.write(f"GET /?k={MARK} HTTP/1.1\r\nHost: {HOST}\r\nX: {MARK}\r\n\r\n".encode())
            head = await head_of(up_reader)
            assert head.startswith(f"GET /?k={quote(VALUE, safe='')} HTTP/1.1".encode())
            assert f"X: {VALUE}".encode() in head
            up_writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            assert (await head_of(reader)).startswith(b"HTTP/1.1 200")
            assert await reader.readexactly(len(body)) == body.replace(VALUE.encode(), MARK[: len(VALUE)].encode())
        assert bench.denied() == {}


async def test_a_body_that_is_cut_short_is_seen_to_be() -> None:
    async with relayed(Http1Relay) as bench:
        (reader, writer), (up_reader, up_writer) = bench.client, bench.server
        writer.write(f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        await head_of(up_reader)
        up_writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        up_writer.close()
        await head_of(reader)
        async with asyncio.timeout(5):
            assert await reader.read() == b"abc"


async def test_more_than_was_said_ends_the_connection() -> None:
    """A server's second answer to a first request must not become the answer to the second."""
    async with relayed(Http1Relay) as bench:
        (reader, writer), (up_reader, up_writer) = bench.client, bench.server
        writer.write(f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode() * 2)
        await head_of(up_reader)
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        up_writer.write(answer + answer)
        await head_of(reader)
        async with asyncio.timeout(5):
            assert await reader.read() == b"ok"


@pytest.mark.parametrize(
    ("fault", "status", "denied"),
    [
        (DialError("connection refused"), b"502", {}),
        (DialError("no", Reason.BLOCKED_ADDRESS), b"403", {"blocked_address": 1}),
    ],
)
async def test_a_server_that_cannot_be_reached(fault: DialError, status: bytes, denied: dict[str, int]) -> None:
    async with relayed(Http1Relay, fault) as bench:
        reader, writer = bench.client
        writer.write(f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        assert status in await head_of(reader)
        assert bench.denied() == denied


# -- HTTP/2 ------------------------------------------------------------------------------------------------------------


class Peer:
    """One end that speaks HTTP/2; events are taken one after the other."""

    def __init__(self, ends: Ends, *, client_side: bool, window: int = 65535) -> None:
        self.reader, self.writer = ends
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=client_side, header_encoding="utf-8")
        )
        keep_streams_after_goaway(self.h2)
        self.h2.local_settings = h2.settings.Settings(
            client=client_side, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self.h2.initiate_connection()
        self.events: list[h2.events.Event] = []
        self.flush()

    def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())

    async def until(self, wanted: Callable[[h2.events.Event], bool]) -> h2.events.Event:
        async with asyncio.timeout(5):
            while True:
                while self.events:
                    event = self.events.pop(0)
                    if wanted(event):
                        return event
                data = await self.reader.read(65536)
                assert data, "the connection ended"
                self.events += self.h2.receive_data(data)
                self.flush()

    async def body(self, stream_id: int) -> bytes:
        """Reads slowly: a window is opened only once it is used up."""
        data = b""
        while True:
            event = await self.until(
                lambda event: isinstance(event, h2.events.DataReceived | h2.events.StreamEnded | h2.events.StreamReset)
            )
            if isinstance(event, h2.events.StreamReset):
                raise ConnectionResetError
            if isinstance(event, h2.events.StreamEnded):
                return data
            assert isinstance(event, h2.events.DataReceived)
            data += event.data
            await asyncio.sleep(0.001)
            self.h2.acknowledge_received_data(event.flow_controlled_length, stream_id)
            self.flush()


def kind(name: type[h2.events.Event]) -> Callable[[h2.events.Event], bool]:
    return lambda event: isinstance(event, name)


REQUEST = [(":method", "POST"), (":scheme", "https"), (":authority", HOST), (":path", "/")]


async def answer(server: Peer, size: int, after: Callable[[int], Awaitable[None] | None]) -> None:
    """Answers the first request with so many bytes, as fast as its window lets it."""
    request = await server.until(kind(h2.events.RequestReceived))
    stream_id = request.stream_id  # type: ignore[attr-defined]
    server.h2.send_headers(stream_id, [(":status", "200")])
    while size:
        room = min(size, server.h2.local_flow_control_window(stream_id), 16384)
        if not room:
            await server.until(kind(h2.events.WindowUpdated))
            continue
        server.h2.send_data(stream_id, bytes(room), end_stream=room == size)
        size -= room
    server.flush()
    result = after(stream_id)
    if result is not None:
        await result


@pytest.mark.parametrize("end", ["close", "reset", "goaway"])
async def test_an_answer_that_is_complete_arrives_whole_however_the_server_ends(end: str) -> None:
    size = 200_000
    async with relayed(Http2Relay) as bench:
        client = Peer(bench.client, client_side=True, window=8192)
        server = Peer(bench.server, client_side=False)
        client.h2.send_headers(1, REQUEST, end_stream=end != "reset")
        client.flush()

        def after(stream_id: int) -> None:
            if end == "reset":  # the request has not ended; nobody wants the rest of it
                server.h2.reset_stream(stream_id, 0)
            elif end == "goaway":  # in one piece with the last of the answer
                server.h2.close_connection(last_stream_id=stream_id)
            server.flush()
            if end != "reset":
                server.writer.close()

        answering = asyncio.create_task(answer(server, size, after))
        assert len(await client.body(1)) == size
        await answering
        assert bench.denied() == {}


async def test_a_server_that_is_leaving_finishes_what_it_has() -> None:
    async with relayed(Http2Relay) as bench:
        client, server = Peer(bench.client, client_side=True), Peer(bench.server, client_side=False)
        client.h2.send_headers(1, REQUEST, end_stream=True)
        client.flush()
        await server.until(kind(h2.events.RequestReceived))
        server.writer.write(b"\0\0\x08\x07\0\0\0\0\0" + (1).to_bytes(4, "big") + bytes(4))  # graceful
        await client.until(kind(h2.events.ConnectionTerminated))
        client.h2.send_headers(3, REQUEST, end_stream=True)
        client.flush()
        refused = await client.until(kind(h2.events.StreamReset))
        assert refused.error_code == 7  # type: ignore[attr-defined]  # REFUSED_STREAM: it may be tried elsewhere
        server.h2.send_headers(1, [(":status", "204")], end_stream=True)
        server.flush()
        response = await client.until(kind(h2.events.ResponseReceived))
        assert dict(response.headers)[":status"] == "204"  # type: ignore[attr-defined]
        async with asyncio.timeout(5):
            await bench.task


async def test_one_that_cannot_be_reached_is_an_answer() -> None:
    async with relayed(Http2Relay, DialError("connection refused")) as bench:
        client = Peer(bench.client, client_side=True)
        client.h2.send_headers(1, REQUEST, end_stream=True)
        client.flush()
        response = await client.until(kind(h2.events.ResponseReceived))
        assert dict(response.headers)[":status"] == "502"  # type: ignore[attr-defined]
        assert b"cannot be reached" in await client.body(1)
