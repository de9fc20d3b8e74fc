"""Sandboxes that stand still and go on: paused, suspended, forked; whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import psutil
import pytest

from sandboxd.v1 import process_pb2
from sandboxd.v1 import sandbox_pb2 as pb
from tests.support.client import MIB, Client
from tests.support.daemon import connected, daemon_with, refused

pytestmark = pytest.mark.vm

# Counts in memory and into a file, ten times a second.
COUNTER = "i=0; while sleep 0.1; do i=$((i+1)); echo $i > /tmp/count; done"


async def start(client: Client, sandbox_id: str, *argv: str) -> int:
    spec = process_pb2.ProcessSpec(argv=argv)
    request = process_pb2.StartProcessRequest(sandbox_id=sandbox_id, spec=spec)
    return int((await client.processes.StartProcess(request)).process_id)


async def output(client: Client, sandbox_id: str, *argv: str) -> str:
    return (await client.run(sandbox_id, *argv)).stdout.decode().strip()


async def count(client: Client, sandbox_id: str) -> int:
    return int(
        await output(client, sandbox_id, "sh", "-c", "until [ -s /tmp/count ]; do sleep 0.05; done; cat /tmp/count")
    )


async def pause(client: Client, sandbox_id: str, *, to_disk: bool) -> pb.Sandbox:
    return await client.sandboxes.PauseSandbox(pb.PauseSandboxRequest(id=sandbox_id, to_disk=to_disk))


async def resume(client: Client, sandbox_id: str) -> pb.Sandbox:
    return await client.sandboxes.ResumeSandbox(pb.ResumeSandboxRequest(id=sandbox_id))


def vmm(sandbox_id: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if process.name() == sandbox_id[:15]]


@pytest.mark.parametrize("to_disk", [False, True])
async def test_a_sandbox_goes_on_where_it_stood(client: Client, to_disk: bool) -> None:
    async with client.sandbox() as sandbox:
        counter = await start(client, sandbox.id, "sh", "-c", COUNTER)
        ending = await start(client, sandbox.id, "sh", "-c", "sleep 2; echo end; exit 7")
        before = await count(client, sandbox.id)
        paused = await pause(client, sandbox.id, to_disk=to_disk)
        assert paused.state == (pb.Sandbox.STATE_SUSPENDED if to_disk else pb.Sandbox.STATE_PAUSED)
        assert await pause(client, sandbox.id, to_disk=to_disk) == paused
        assert bool(vmm(sandbox.id)) is not to_disk
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "SANDBOX_NOT_RUNNING"):
            await client.run(sandbox.id, "true")
        await asyncio.sleep(1.5)
        resumed = await resume(client, sandbox.id)
        assert resumed.state == pb.Sandbox.STATE_RUNNING
        assert (await resume(client, sandbox.id)).state == pb.Sandbox.STATE_RUNNING
        asked = time.time()
        guest = float(await output(client, sandbox.id, "date", "+%s.%N"))
        assert asked - 0.5 < guest < time.time() + 0.5
        assert before <= await count(client, sandbox.id) < before + 15  # it did not count while it stood
        waited = await client.processes.Wait(process_pb2.WaitRequest(sandbox_id=sandbox.id, process_id=ending))
        assert waited.exit.exit_code == 7
        listed = await client.processes.ListProcesses(process_pb2.ListProcessesRequest(sandbox_id=sandbox.id))
        assert {process.process_id for process in listed.processes} >= {counter, ending}


async def test_copies_go_on_from_one_moment_each_by_itself(client: Client) -> None:
    async with client.sandbox(labels={"a": "b"}, disk_bytes=64 * MIB) as parent:
        counter = await start(client, parent.id, "sh", "-c", COUNTER)
        await client.run(parent.id, "sh", "-c", "echo shared > /home/sandbox/file")
        before = await count(client, parent.id)
        request = pb.ForkSandboxRequest(id=parent.id, count=3, labels={"c": "d"}, request_id="fork-1")
        copies = list((await client.sandboxes.ForkSandbox(request)).sandboxes)
        try:
            assert list((await client.sandboxes.ForkSandbox(request)).sandboxes) == copies
            ids = [copy.id for copy in copies]
            assert len({parent.id, *ids}) == 4
            for copy in copies:
                assert (copy.state, copy.parent) == (pb.Sandbox.STATE_RUNNING, parent.id)
                assert dict(copy.labels) == {"a": "b", "c": "d"}
            everyone = [parent.id, *ids]
            assert [await output(client, one, "hostname") for one in everyone] == everyone
            for path in ("/etc/machine-id", "/proc/sys/kernel/random/uuid"):
                assert len({await output(client, one, "cat", path) for one in everyone}) == 4, path
            for one in everyone:
                assert await output(client, one, "cat", "/home/sandbox/file") == "shared"
                await client.run(one, "sh", "-c", f"echo {one} > /home/sandbox/file")
                assert await count(client, one) > before
                listing = process_pb2.ListProcessesRequest(sandbox_id=one)
                listed = await client.processes.ListProcesses(listing)
                assert counter in [process.process_id for process in listed.processes if not process.HasField("exit")]
            for one in everyone:
                assert await output(client, one, "cat", "/home/sandbox/file") == one
        finally:
            for copy in copies:
                await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=copy.id, allow_missing=True))


async def test_what_cannot_be_forked_says_so(client: Client) -> None:
    async with client.sandbox() as sandbox:
        for wrong in (pb.ForkSandboxRequest(id=sandbox.id, count=65), pb.ForkSandboxRequest(id=sandbox.id, count=-1)):
            with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC"):
                await client.sandboxes.ForkSandbox(wrong)
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "NODE_FULL"):
            await client.sandboxes.ForkSandbox(pb.ForkSandboxRequest(id=sandbox.id, count=64))
        await pause(client, sandbox.id, to_disk=True)
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "SANDBOX_NOT_RUNNING"):
            await client.sandboxes.ForkSandbox(pb.ForkSandboxRequest(id=sandbox.id))
        # Deleting what is on the disk alone leaves nothing either: the daemon's end looks.


async def test_what_stands_still_outlives_the_agent(directory: Path) -> None:
    with daemon_with(directory, keeps=True, sandbox__on_stop="keep") as daemon:
        async with connected(daemon) as client:
            made = [await client.sandboxes.CreateSandbox(pb.CreateSandboxRequest(memory_bytes=256 * MIB)) for _ in "12"]
            in_memory, on_disk = made
            for one in made:
                await start(client, one.id, "sh", "-c", COUNTER)
            counts = [await count(client, one.id) for one in made]
            await pause(client, in_memory.id, to_disk=False)
            await pause(client, on_disk.id, to_disk=True)
        daemon.kill()
    with daemon_with(directory, keeps=True, sandbox__on_stop="keep") as daemon:
        async with connected(daemon) as client:
            states = [await _state(client, one.id) for one in made]
            assert states == [pb.Sandbox.STATE_PAUSED, pb.Sandbox.STATE_SUSPENDED]
    with daemon_with(directory) as daemon:
        async with connected(daemon) as client:
            for one, before in zip(made, counts, strict=True):
                await resume(client, one.id)
                assert before <= await count(client, one.id) < before + 20
            await pause(client, on_disk.id, to_disk=True)


async def _state(client: Client, sandbox_id: str) -> int:
    return (await client.sandboxes.GetSandbox(pb.GetSandboxRequest(id=sandbox_id))).state
