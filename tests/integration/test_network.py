"""NetworkService: connections to servers inside of a guest."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import grpc
import pytest

from sandboxd.v1 import network_pb2 as pb
from sandboxd.v1 import process_pb2, sandbox_pb2
from tests.support.client import MIB, Client
from tests.support.daemon import refused, until

pytestmark = pytest.mark.vm

PORT = 7000
# Echoes what it gets; answers the end of input with a count, then ends itself: both halves are seen.
SERVER = f"""
import asyncio

async def echo(reader, writer):
    total = 0
    while data := await reader.read(65536):
        total += len(data)
        writer.write(data)
        await writer.drain()
    writer.write(b"END %d" % total)
    await writer.drain()
    writer.close()

async def main():
    servers = [await asyncio.start_server(echo, host, {PORT}, backlog=100) for host in ("127.0.0.1", "::1")]
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
async def server(client: Client, sandbox: sandbox_pb2.Sandbox) -> AsyncIterator[str]:
    """An echo server on the guest's loopback; yields the sandbox's id."""
    spec = process_pb2.ProcessSpec(argv=["python3", "-c", SERVER])
    request = process_pb2.StartProcessRequest(sandbox_id=sandbox.id, spec=spec)
    started = await client.processes.StartProcess(request)
    opened = process_pb2.AttachRequest.Open(sandbox_id=sandbox.id, process_id=started.process_id)
    async for response in client.processes.Attach(iter([process_pb2.AttachRequest(open=opened)])):
        if response.stdout:
            break
    yield sandbox.id
    kill = process_pb2.SendSignalRequest(sandbox_id=sandbox.id, process_id=started.process_id, signal="KILL")
    await client.processes.SendSignal(kill)
    await client.processes.Wait(process_pb2.WaitRequest(sandbox_id=sandbox.id, process_id=started.process_id))


async def dial(client: Client, sandbox_id: str, *pieces: bytes, port: int = PORT, host: str = "") -> bytes:
    """Sends all, ends its side, returns all that comes back."""

    async def messages() -> AsyncIterator[pb.DialRequest]:
        yield pb.DialRequest(open=pb.DialRequest.Open(sandbox_id=sandbox_id, port=port, host=host))
        for piece in pieces:
            yield pb.DialRequest(data=piece)

    return b"".join([response.data async for response in client.network.Dial(messages())])


async def connections(client: Client, sandbox_id: str) -> int:
    """Returns how many connections to the server the guest has, in any state but the waits of TCP itself."""
    result = await client.run(sandbox_id, "cat", "/proc/net/tcp")
    return sum(f":{PORT:04X}" in line and line.split()[3] == "01" for line in result.stdout.decode().splitlines())


async def test_bytes_go_both_ways_and_each_side_ends_alone(client: Client, server: str) -> None:
    assert await dial(client, server, b"hello ", b"there") == b"hello thereEND 11"
    assert await dial(client, server) == b"END 0"
    for host in ("localhost", "::1", "[::1]"):
        assert await dial(client, server, b"x", host=host) == b"xEND 1"
    data = os.urandom(4 * MIB)
    pieces = [data[start : start + MIB // 2] for start in range(0, len(data), MIB // 2)]
    async with asyncio.timeout(60):
        assert await dial(client, server, *pieces) == data + b"END %d" % len(data)


async def test_the_first_message_says_that_the_connection_is_there(client: Client, server: str) -> None:
    lines: asyncio.Queue[bytes] = asyncio.Queue()

    async def messages() -> AsyncIterator[pb.DialRequest]:
        yield pb.DialRequest(open=pb.DialRequest.Open(sandbox_id=server, port=PORT))
        while True:
            yield pb.DialRequest(data=await lines.get())

    call = client.network.Dial(messages())
    responses = aiter(call)
    assert (await anext(responses)).data == b""
    for line in (b"one", b"two"):
        lines.put_nowait(line)
        assert (await anext(responses)).data == line
    assert await connections(client, server) == 2  # each end of one connection has a line
    call.cancel()

    async def closed() -> bool:
        return await connections(client, server) == 0

    await until(closed)


async def test_fifty_connections_at_once(client: Client, server: str) -> None:
    data = [bytes([number]) * 10_000 for number in range(50)]
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(dial(client, server, piece) for piece in data))
    assert answers == [piece + b"END 10000" for piece in data]


async def test_what_cannot_be_dialled(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "ECONNREFUSED"):
        await dial(client, sandbox.id, port=1)
    for port in (0, -1, 65536, 1 << 30):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC"):
            await dial(client, sandbox.id, port=port)
    for host in ("example.org", "a\0b", "x" * 1000, "1.2.3"):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC"):
            await dial(client, sandbox.id, port=80, host=host)
    with refused(grpc.StatusCode.NOT_FOUND, "SANDBOX_NOT_FOUND"):
        await dial(client, "sbx-0000000000000000")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC"):
        async for _ in client.network.Dial(iter([pb.DialRequest(data=b"x")])):
            raise AssertionError("connected")
