"""What can happen to the host under the agent: its disk full, read-only or slow; its egress process stopped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from agent.daemon.host import cgroup
from sandboxd.v1 import sandbox_pb2 as pb
from sandboxd.v1 import volume_pb2 as volumes
from tests.integration.test_failure import vmm_of
from tests.integration.test_template_faults import remount
from tests.support.client import MIB, Client
from tests.support.daemon import Daemon, connected, daemon_with, refused, start_daemon
from tests.tools.reliability import Reliability

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120)]

SMALL: dict[str, Any] = {"memory_bytes": 128 * MIB, "disk_bytes": 32 * MIB}


@asynccontextmanager
async def served(directory: Path) -> AsyncIterator[tuple[Daemon, Client]]:
    with daemon_with(directory, node__reserved_disk_bytes="0") as daemon:
        async with connected(daemon) as client:
            yield daemon, client


async def code_of(client: Client) -> str:
    """Returns "" if a sandbox can be made, else why not."""
    try:
        async with client.sandbox(**SMALL):
            return ""
    except grpc.aio.AioRpcError as error:
        return str(error.details())


async def test_a_full_disk(directory: Path, reliability: Reliability) -> None:
    state = directory / "state"
    with disk(directory / "disk"), mounted(directory / "disk", state):
        async with served(directory) as (daemon, client), client.sandbox(**SMALL) as running:
            fill(state / "ballast")
            told = await code_of(client)
            assert (await client.run(running.id, "true")).code == 0
            with contextlib.suppress(grpc.aio.AioRpcError):  # refused or made: it must not hang, nor leave anything
                request = volumes.CreateVolumeRequest(slug="large", capacity_bytes=64 * MIB)
                await client.volumes.CreateVolume(request)
                await client.volumes.DeleteVolume(volumes.DeleteVolumeRequest(id_or_slug="large"))
            shutil.rmtree(state / "ballast")
            assert await code_of(client) == ""
            assert all(running.id in path for path in daemon.left())
    assert told
    assert "internal error" not in told
    reliability.seen(
        "the disk of the state is full", "creates say so and leave nothing; sandboxes that run go on",
        f"a create: {told.splitlines()[0].replace(str(directory), '')}",
    )  # fmt: skip


async def test_a_disk_that_fails(directory: Path, reliability: Reliability) -> None:
    """Its file system goes read-only under the agent, as ext4 does at an error, and is repaired."""
    state = directory / "state"
    with disk(directory / "disk"):
        with mounted(directory / "disk", state):
            failing = start_daemon(directory, node__reserved_disk_bytes="0")
            async with connected(failing) as client:
                running = await client.sandboxes.CreateSandbox(pb.CreateSandboxRequest(**SMALL))
                os.sync()  # what was written just before is gone
                await remount(state, "abort")
                told = await code_of(client)
                assert (await client.run(running.id, "true")).code == 0
            failing.kill()
            vmm_of(running.id).kill()
        with mounted(directory / "disk", state):
            async with served(directory) as (_, client):
                found = await client.sandboxes.GetSandbox(pb.GetSandboxRequest(id=running.id))
                assert found.state == pb.Sandbox.STATE_LOST
                assert await code_of(client) == ""
                await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=running.id))
    assert told
    assert "internal error" not in told
    reliability.seen(
        "the disk of the state goes read-only", "creates say so and leave nothing; execs go on; repaired, all is found",
        f"a create: {told.splitlines()[0].replace(str(directory), '')}",
    )  # fmt: skip


def fill(place: Path) -> None:
    """Takes all the room that there is, down to the last block."""
    place.mkdir()
    for size in (MIB, 4096, 1):
        with contextlib.suppress(OSError), (place / str(size)).open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * size)


@contextmanager
def disk(image: Path) -> Iterator[None]:
    """A file that is a disk with a file system of a gigabyte."""
    with image.open("wb") as file:
        file.truncate(1 << 30)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    yield
    image.unlink()


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)
        # A VMM that was killed has it in its own mount namespace for a moment longer.
        deadline = time.monotonic() + 20
        while subprocess.run(["losetup", "-j", image], check=True, capture_output=True).stdout:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@contextmanager
def slow(place: Path, writes_per_s: int) -> Iterator[Path]:
    """Yields a cgroup whose processes may write only so often to the disk of a path."""
    group = Path("/sys/fs/cgroup/blkio") / f"sandboxd-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "blkio.throttle.write_iops_device").write_text(f"{cgroup.block_device(place)} {writes_per_s}")
    except OSError as error:
        pytest.skip(f"no disk can be made slow here: {error}")
    try:
        yield group
    finally:
        group.rmdir()


async def test_a_slow_disk(directory: Path, reliability: Reliability) -> None:
    state = directory / "state"
    with disk(directory / "disk"), mounted(directory / "disk", state), slow(state, writes_per_s=2) as group:
        async with served(directory) as (daemon, client), client.sandbox(**SMALL) as running:
            (group / "cgroup.procs").write_text(str(daemon.process.pid))
            start = time.monotonic()
            making = asyncio.create_task(make_durably(client))
            slowest = await client.slowest_beside(running.id, making)
            await making
            took = time.monotonic() - start
            (group.parent / "cgroup.procs").write_text(str(daemon.process.pid))
    assert took > 1.5, "the disk was not slow"
    assert slowest < 1.5
    reliability.seen(
        "the disk of the state does two writes a second", "what must be written waits; everything else goes on",
        f"a volume and its snapshots took {took:.1f} s; an exec meanwhile {slowest:.2f} s at most",
    )  # fmt: skip


async def make_durably(client: Client) -> None:
    """Makes what must outlive the host's power, and so is written at once."""
    await client.volumes.CreateVolume(volumes.CreateVolumeRequest(slug="slow", capacity_bytes=16 * MIB))
    for number in range(3):
        request = volumes.CreateSnapshotRequest(volume="slow", slug=f"slow-{number}")
        await client.volumes.CreateSnapshot(request)


def egress_of(daemon: Daemon) -> int:
    return int(json.loads((daemon.run_dir / "egress.json").read_text())["pid"])


async def test_a_stopped_egress_process(directory: Path, reliability: Reliability) -> None:
    async with served(directory) as (daemon, client), client.sandbox(**SMALL) as running:
        stopped = egress_of(daemon)
        os.kill(stopped, signal.SIGSTOP)
        start = time.monotonic()
        with refused(grpc.StatusCode.INTERNAL, "EGRESS_NOT_RUNNING"):
            await client.sandboxes.CreateSandbox(pb.CreateSandboxRequest(**SMALL))
        took = time.monotonic() - start
        assert took < 20
        assert (await client.run(running.id, "true")).code == 0
        assert await code_of(client) == ""
        assert egress_of(daemon) != stopped
    reliability.seen(
        "SIGSTOP of sandboxd-egress",
        "nothing passes; creates say so in time; execs go on; it is ended and started anew",
        f"a create was refused after {took:.0f} s, and the next one made",
    )
