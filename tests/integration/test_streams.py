"""Long streams: they cost no memory, disturb nobody, and end with their client."""

from __future__ import annotations

import asyncio
import hashlib
import os
import statistics
import time
from collections.abc import AsyncIterator

import psutil
import pytest

from sandboxd.v1 import process_pb2, sandbox_pb2
from tests.support.client import MIB, Client
from tests.support.daemon import Daemon, until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

# About 16 MiB/s under emulation on two shared processors.
STREAM_BYTES = (1024 if os.environ.get("SANDBOXD_TEST_LONG") else 256) * MIB
# What may come and go with the allocator and the guest's page cache.
SLACK_BYTES = 48 * MIB
# A client that reads nothing for so long has all buffers of the way full.
PAUSE_S = 1.5


async def exec_messages(sandbox_id: str, *argv: str) -> AsyncIterator[process_pb2.ExecRequest]:
    start = process_pb2.ExecRequest.Start(sandbox_id=sandbox_id, spec=process_pb2.ProcessSpec(argv=argv))
    yield process_pb2.ExecRequest(start=start)


class Meter:
    """What the agent and the guest use."""

    def __init__(self, client: Client, daemon: Daemon, sandbox: sandbox_pb2.Sandbox) -> None:
        self._client = client
        self._agent = psutil.Process(daemon.process.pid)
        self._id = sandbox.id

    async def read(self) -> tuple[int, int]:
        """Returns resident bytes of the agent, used bytes of the guest."""
        stats = await self._client.sandboxes.GetSandboxStats(sandbox_pb2.GetSandboxStatsRequest(id=self._id))
        return self._agent.memory_info().rss, stats.memory_total_bytes - stats.memory_available_bytes

    async def processes(self) -> int:
        stats = await self._client.sandboxes.GetSandboxStats(sandbox_pb2.GetSandboxStatsRequest(id=self._id))
        return int(stats.process_count)

    async def exec_s(self) -> float:
        start = time.perf_counter()
        assert (await self._client.run(self._id, "true")).code == 0
        return time.perf_counter() - start


@pytest.fixture
def meter(client: Client, daemon: Daemon, sandbox: sandbox_pb2.Sandbox) -> Meter:
    return Meter(client, daemon, sandbox)


async def test_a_long_stream_read_slowly_costs_no_memory_and_disturbs_nobody(
    client: Client, sandbox: sandbox_pb2.Sandbox, meter: Meter
) -> None:
    quiet_s = statistics.median([await meter.exec_s() for _ in range(10)])
    received, samples, busy = 0, [await meter.read()], []
    marks = [STREAM_BYTES * number // 8 for number in range(1, 8)]
    async for response in client.processes.Exec(
        exec_messages(sandbox.id, "head", "-c", str(STREAM_BYTES), "/dev/zero")
    ):
        received += len(response.stdout)
        if marks and received >= marks[0]:
            marks.pop(0)
            busy.append(await meter.exec_s())  # while the stream flows
            if len(marks) % 3 == 0:
                await asyncio.sleep(PAUSE_S)  # a reader that stops: everything before it has to wait
            samples.append(await meter.read())
            busy.append(await meter.exec_s())
    assert received == STREAM_BYTES
    assert len(samples) == 8
    for kind in range(2):
        used = [sample[kind] for sample in samples]
        assert max(used) - used[0] < SLACK_BYTES, used
    # Emulation shares two processors with the stream itself.
    assert statistics.median(busy) < 15 * quiet_s + 0.25, (quiet_s, busy)


async def test_input_of_many_megabytes_arrives_whole(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    data = os.urandom(MIB) * 64
    result = await client.run(sandbox.id, "sha256sum", stdin=data)
    assert result.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


async def test_a_client_that_leaves_in_mid_stream_leaves_nothing(
    client: Client, sandbox: sandbox_pb2.Sandbox, meter: Meter
) -> None:
    assert await meter.exec_s() < 5
    before, memory = await meter.processes(), await meter.read()
    for _ in range(10):
        call = client.processes.Exec(exec_messages(sandbox.id, "cat", "/dev/zero"))
        received = 0
        async for response in call:
            received += len(response.stdout)
            if received > 2 * MIB:
                break
        call.cancel()
    async with asyncio.timeout(10):
        assert await meter.exec_s() < 5

    async def as_before() -> bool:
        return await meter.processes() <= before

    await until(as_before)
    for kind, used in enumerate(await meter.read()):
        assert used - memory[kind] < SLACK_BYTES
    listing = process_pb2.ListProcessesRequest(sandbox_id=sandbox.id)
    assert [one for one in (await client.processes.ListProcesses(listing)).processes if not one.HasField("exit")] == []
