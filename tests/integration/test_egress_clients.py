"""Clients that no small image has, on a sandbox's network without its VM: gRPC, HTTP/2 by hand, a hundred sandboxes."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import hpack
import pytest

from agent.common.model import SecretSpec
from agent.common.policy.rules import parse_rules
from tests.support.internet import zone
from tests.support.internet.internet import Internet
from tests.support.netguest import Guest, GuestNet, guest_net

pytestmark = pytest.mark.vm  # root and namespaces, as for those

VALUE = "the-real-value-0123456789abcdef"
PLACEHOLDER = "sbx_secret_ABCDEFGHIJKLMNOPQRST"


@pytest.fixture
async def net(internet: Internet) -> AsyncIterator[GuestNet]:
    async with guest_net(internet) as made:
        yield made


def secrets(*hosts: str, **fields: Any) -> dict[str, tuple[SecretSpec, str]]:
    return {"KEY": (SecretSpec("KEY", parse_rules(hosts, "hosts"), PLACEHOLDER, **fields), VALUE)}


async def trusting(guest: Guest) -> ssl.SSLContext:
    order = await guest.net.secrets.trust_fields(guest.record.id, guest.record.secrets)
    assert order is not None
    return guest.trust(guest.net.internet, str(order["certificate"]))


class _Forwarder:
    """Takes connections on the test's loopback and makes them as the guest: for clients with sockets of their own."""

    def __init__(self, guest: Guest, address: str, port: int) -> None:
        self._target = (guest, address, port)
        self.port = 0

    async def __aenter__(self) -> _Forwarder:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        guest, address, port = self._target
        up_reader, up_writer = await asyncio.open_connection(sock=await guest.connect(address, port))

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65536):
                    target.write(data)
                    await target.drain()
                target.close()
            except OSError:
                target.close()

        await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer))


def _method(kind: Any, name: str) -> Any:
    """A method of bytes: no messages are needed to see what passes."""
    return kind(f"/test.Echo/{name}")


async def test_grpc_passes_opened_and_unopened(net: GuestNet) -> None:
    for opened in (False, True):
        given = secrets(f"grpc.example:{zone.GRPC_PORT}") if opened else None
        guest = await net.guest([f"grpc.example:{zone.GRPC_PORT}"], secrets=given)
        roots = await asyncio.to_thread(Path(net.internet.ca_file).read_bytes)
        if opened:
            order = await net.secrets.trust_fields(guest.record.id, guest.record.secrets)
            assert order is not None
            roots += str(order["certificate"]).encode()
        (address,) = await guest.resolve("grpc.example")
        options = [
            ("grpc.ssl_target_name_override", "grpc.example"),
            ("grpc.default_authority", f"grpc.example:{zone.GRPC_PORT}"),
        ]
        async with (
            _Forwarder(guest, address, zone.GRPC_PORT) as forwarder,
            grpc.aio.secure_channel(
                f"127.0.0.1:{forwarder.port}", grpc.ssl_channel_credentials(roots), options=options
            ) as channel,
        ):
            call = _method(channel.unary_unary, "Unary")(
                b"hello", metadata=[("authorization", f"Bearer {PLACEHOLDER}")]
            )
            answer = await call
            sent = VALUE if opened else PLACEHOLDER
            assert answer.endswith(b"|hello")
            # What comes back of the value is taken out, and as long as before.
            assert answer == b"Bearer " + (PLACEHOLDER.encode() if opened else sent.encode()) + b"|hello"
            assert dict(await call.trailing_metadata())["x-trailer"] == "yes"
            bidi = _method(channel.stream_stream, "Bidi")()
            for word in (b"one", b"two"):
                await bidi.write(word)
                assert await bidi.read() == word.upper()
            await bidi.done_writing()
            assert await bidi.read() == grpc.aio.EOF  # type: ignore[attr-defined]
            big = os.urandom(3 << 20)
            assert (await _method(channel.unary_unary, "Unary")(big)).endswith(big)


class Http2:
    """An HTTP/2 client that may do anything."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        config = h2.config.H2Configuration(validate_outbound_headers=False, header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())

    async def request(
        self, authority: str, path: str = "/", *extra: tuple[str, str], body: bytes = b""
    ) -> tuple[int, bytes]:
        """Returns status and body of the answer."""
        stream_id = self.h2.get_next_available_stream_id()
        head = [(":method", "POST" if body else "GET"), (":scheme", "https"), (":path", path)]
        head += [(":authority", authority)] if authority else []
        self.h2.send_headers(stream_id, [*head, *extra], end_stream=not body)
        for start in range(0, len(body), 16384):
            self.h2.send_data(stream_id, body[start : start + 16384], end_stream=start + 16384 >= len(body))
        self.flush()
        status, data = 0, b""
        async with asyncio.timeout(10):
            while piece := await self.reader.read(65536):
                for event in self.h2.receive_data(piece):
                    if isinstance(event, h2.events.ResponseReceived):
                        status = int({str(name): str(value) for name, value in event.headers}[":status"])
                    elif isinstance(event, h2.events.DataReceived):
                        data += event.data
                        self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    elif isinstance(event, h2.events.StreamEnded):
                        self.flush()
                        return status, data
                    elif isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                        return -1, data
                self.flush()
        return -2, data


async def http2(guest: Guest, host: str = "web.example") -> Http2:
    context = await trusting(guest)
    context.set_alpn_protocols(["h2"])
    return Http2(*await guest.open(host, 443, tls=context))


async def test_another_authority_on_a_connection_is_turned_away(net: GuestNet) -> None:
    guest = await net.guest(["web.example", "other.example"], secrets=secrets("web.example"))
    mark = net.internet.mark()
    client = await http2(guest)
    assert (await client.request("web.example", "/headers", ("x-key", PLACEHOLDER)))[0] == 200
    # Coalescing: the certificate is the name's alone, but a hostile client does not care.
    status, text = await client.request("other.example", "/headers", ("x-key", PLACEHOLDER))
    assert (status, b"host_mismatch" in text) == (421, True)
    assert (await client.request("web.example", "/headers"))[0] == 200
    client.writer.close()
    assert (await guest.settle()) == {"host_mismatch": 1}
    lines = net.internet.since(mark, "http")
    assert [(line["host"], line["version"]) for line in lines] == [("web.example", "2")] * 2
    assert dict(lines[0]["headers"])["x-key"] == VALUE
    for authority, extra in (("web.example", [("host", "other.example")]), ("", [])):
        client = await http2(guest)
        assert (await client.request(authority, "/", *extra))[0] < 0  # two hosts, or none: no HTTP/2 at all
        client.writer.close()
    assert (await guest.settle()) == {"host_mismatch": 1, "malformed": 2}
    assert len(net.internet.since(mark, "http")) == 2


async def test_streams_of_one_connection_go_side_by_side(net: GuestNet) -> None:
    guest = await net.guest(["web.example"], inspect=True)
    client = await http2(guest)
    # A slow stream is open while others come and go, bodies both ways.
    slow = client.h2.get_next_available_stream_id()
    head = [(":method", "GET"), (":scheme", "https"), (":authority", "web.example"), (":path", "/sse?n=100&pause=0.1")]
    client.h2.send_headers(slow, head, end_stream=True)
    client.flush()
    for size in (1, 1000, 60_000):
        status, data = await client.request("web.example", "/echo", body=b"b" * size)
        assert status == 200
        assert data.count(b"b") == size
    status, data = await client.request("web.example", f"/stream?n={3 << 20}")
    assert (status, data.count(b"\0")) == (200, 3 << 20)
    client.writer.close()
    assert await guest.settle() == {}


async def test_a_header_table_that_unpacks_to_much_is_refused(net: GuestNet) -> None:
    guest = await net.guest(["web.example"], inspect=True)
    client = await http2(guest)
    encoder = hpack.Encoder()
    head = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"web.example"), (b":path", b"/")]
    first = encoder.encode([*head, (b"x", b"a" * 4000)])
    bomb = first + b"\xbe" * 12000  # each byte is that header again, from the table
    frame = len(bomb).to_bytes(3, "big") + b"\x01\x05" + (1).to_bytes(4, "big") + bomb
    client.writer.write(frame)
    async with asyncio.timeout(10):
        while await client.reader.read(65536):
            pass
    client.writer.close()
    assert await guest.settle() == {"too_large": 1}
    # And the process is there for others.
    client = await http2(guest)
    assert (await client.request("web.example", "/headers"))[0] == 200
    client.writer.close()


async def test_h2_without_tls_and_names_that_change(net: GuestNet) -> None:
    guest = await net.guest(["web.example"])
    reader, writer = await guest.open("web.example", 80)
    client = Http2(reader, writer)
    # The server does not speak it; what matters is that each request is judged before it is asked.
    status, text = await client.request("evil.example")
    assert (status, b"host_not_allowed" in text) == (403, True)
    writer.close()
    assert await guest.settle() == {"host_not_allowed": 1}


async def test_a_hundred_sandboxes_leave_nothing(net: GuestNet) -> None:
    """As many networks as a node has, made and removed: what the kernel and both processes hold is as before."""
    for allow in (["web.example"], None):
        await (await net.guest(allow)).resolve("web.example")
    before = _held(net)
    policies: list[list[str] | None] = [["web.example"], None, [], ["45.0.0.0/24"]]
    async with _Batch(net) as batch:
        for number in range(100):
            guest = await batch.guest(policies[number % 4])
            if number % 10 == 0:
                await guest.resolve("web.example")
        assert _held(net) != before
    for _ in range(50):
        if (after := _held(net)) == before:
            break
        await asyncio.sleep(0.1)
    assert after == before


class _Batch:
    """Guests that are gone at the end of the block."""

    def __init__(self, net: GuestNet) -> None:
        self._net = net

    async def __aenter__(self) -> GuestNet:
        self._outer, self._net.stack = self._net.stack, AsyncExitStack()
        return self._net

    async def __aexit__(self, *_: object) -> None:
        await self._net.stack.aclose()
        self._net.stack = self._outer


def _held(net: GuestNet) -> dict[str, object]:
    pid = json.loads((net.directory / "run" / "egress.json").read_text())["pid"]

    def lines(*words: str) -> int:
        return len(subprocess.run(words, check=True, capture_output=True).stdout.splitlines())

    return {
        "namespaces": sorted(name for name in os.listdir("/run/netns") if name.startswith(("sbx-", "egg-"))),
        "links": lines("ip", "-n", net.internet.uplink, "-o", "link"),
        "rules": lines("ip", "netns", "exec", net.internet.uplink, "nft", "list", "ruleset"),
        "descriptors of the egress process": len(os.listdir(f"/proc/{pid}/fd")),
        "descriptors of ours": len(os.listdir("/proc/self/fd")),
        "threads": sum(thread.name.startswith("netns") for thread in threading.enumerate()),
    }
