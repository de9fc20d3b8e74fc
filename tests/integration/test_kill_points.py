"""SIGKILL of the agent at the beginning of every step of every operation: nothing is lost, and nothing is left.

Which steps there are is recorded from a run of the operation that nobody disturbs; then it is run again for each of
them, with an agent that ends there. The next agent must find the operation done, or not begun, or finish it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from sandboxd.v1 import process_pb2, volume_pb2
from sandboxd.v1 import sandbox_pb2 as pb
from tests.support.client import MIB, Client
from tests.support.daemon import Daemon, connected, daemon_with, start_daemon
from tests.tools.reliability import Reliability

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

STATES = pb.Sandbox
COUNTER = "i=0; while sleep 0.1; do i=$((i+1)); echo $i > /tmp/count; done"
KEEP = {"sandbox__on_stop": "keep", "log__level": "warning"}


@dataclass
class Scene:
    """A sandbox in which a program counts, made before the operation."""

    id: str = ""
    process_id: int = 0
    count: int = 0


Step = Callable[[Client, Scene], Awaitable[object]]


@dataclass(frozen=True)
class Operation:
    """What is done beforehand by an agent that nobody disturbs, and what is done when the agent is killed."""

    act: Step
    prepare: tuple[Step, ...] = ()
    check: tuple[Step, ...] = ()


async def output(client: Client, sandbox_id: str, script: str) -> str:
    result = await client.run(sandbox_id, "sh", "-c", script)
    assert result.code == 0, result.stderr
    return result.stdout.decode().strip()


async def count(client: Client, sandbox_id: str) -> int:
    script = 'until c=$(cat /tmp/count 2>/dev/null) && [ "$c" ]; do sleep 0.05; done; echo $c'
    return int(await output(client, sandbox_id, script))


async def create(client: Client, _scene: Scene) -> None:
    await client.sandboxes.CreateSandbox(
        pb.CreateSandboxRequest(memory_bytes=256 * MIB, disk_bytes=64 * MIB, request_id="once")
    )


async def make(client: Client, scene: Scene) -> None:
    await create(client, scene)
    scene.id = (await listed(client))[0].id
    spec = process_pb2.ProcessSpec(argv=["sh", "-c", COUNTER])
    started = await client.processes.StartProcess(process_pb2.StartProcessRequest(sandbox_id=scene.id, spec=spec))
    scene.process_id = started.process_id
    scene.count = await count(client, scene.id)


async def listed(client: Client) -> list[pb.Sandbox]:
    return list((await client.sandboxes.ListSandboxes(pb.ListSandboxesRequest())).sandboxes)


async def delete(client: Client, scene: Scene) -> None:
    await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=scene.id))


async def pause(client: Client, scene: Scene) -> None:
    await client.sandboxes.PauseSandbox(pb.PauseSandboxRequest(id=scene.id))


async def suspend(client: Client, scene: Scene) -> None:
    await client.sandboxes.PauseSandbox(pb.PauseSandboxRequest(id=scene.id, to_disk=True))


async def resume(client: Client, scene: Scene) -> None:
    await client.sandboxes.ResumeSandbox(pb.ResumeSandboxRequest(id=scene.id))


async def fork(client: Client, scene: Scene) -> None:
    await client.sandboxes.ForkSandbox(pb.ForkSandboxRequest(id=scene.id, count=2))


async def make_volume(client: Client, _scene: Scene) -> None:
    await client.volumes.CreateVolume(volume_pb2.CreateVolumeRequest(slug="data", capacity_bytes=64 * MIB))


async def snapshot_volume(client: Client, _scene: Scene) -> None:
    await client.volumes.CreateSnapshot(volume_pb2.CreateSnapshotRequest(volume="data", slug="copy"))


async def all_work(client: Client, _scene: Scene) -> None:
    """Whatever there is runs and answers; and the create, asked for again, gives one sandbox."""
    for sandbox in await listed(client):
        assert sandbox.state == STATES.STATE_RUNNING, sandbox
        await output(client, sandbox.id, "true")
    await create(client, _scene)
    assert len(await listed(client)) == 1


async def gone_or_whole(client: Client, scene: Scene) -> None:
    """The sandbox is gone, or as it was."""
    for sandbox in await listed(client):
        assert (sandbox.id, sandbox.state) == (scene.id, STATES.STATE_RUNNING)
        await counts_on(client, scene)
        await delete(client, scene)
    assert await listed(client) == []


async def counts_on(client: Client, scene: Scene) -> None:
    """The sandbox goes on where it stood, with the program that was started under another agent."""
    (sandbox,) = [one for one in await listed(client) if one.id == scene.id]
    assert sandbox.state in (STATES.STATE_RUNNING, STATES.STATE_PAUSED, STATES.STATE_SUSPENDED), sandbox
    await resume(client, scene)
    assert await count(client, scene.id) >= scene.count
    request = process_pb2.ListProcessesRequest(sandbox_id=scene.id)
    running = [one.process_id for one in (await client.processes.ListProcesses(request)).processes]
    assert scene.process_id in running


async def family_works(client: Client, scene: Scene) -> None:
    """The parent goes on, and so does every copy that there is."""
    await counts_on(client, scene)
    for sandbox in await listed(client):
        if sandbox.id != scene.id:
            assert (sandbox.state, sandbox.parent) == (STATES.STATE_RUNNING, scene.id)
            assert await count(client, sandbox.id) >= scene.count


async def volumes_are_whole(client: Client, scene: Scene) -> None:
    """Each volume and snapshot is there whole or not at all: its name can be used, and it can be deleted."""
    known = {volume.slug for volume in (await client.volumes.ListVolumes(volume_pb2.ListVolumesRequest())).volumes}
    if "data" not in known:
        await make_volume(client, scene)
    request = volume_pb2.ListSnapshotsRequest()
    copies = [one.slug for one in (await client.volumes.ListSnapshots(request)).snapshots]
    if not copies:
        await snapshot_volume(client, scene)
    async with client.sandbox(volumes={"/data": "data"}) as sandbox:
        await output(client, sandbox.id, "touch /data/file && sync")
    await client.volumes.DeleteSnapshot(volume_pb2.DeleteSnapshotRequest(id_or_slug="copy"))
    await client.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(id_or_slug="data"))


OPERATIONS = {
    "create": Operation(create, (), (all_work,)),
    "delete": Operation(delete, (make,), (gone_or_whole,)),
    "pause": Operation(pause, (make,), (counts_on,)),
    "resume": Operation(resume, (make, pause), (counts_on,)),
    "pause to disk": Operation(suspend, (make,), (counts_on,)),
    "resume from disk": Operation(resume, (make, suspend), (counts_on,)),
    "fork": Operation(fork, (make,), (family_works,)),
    "restart": Operation(counts_on, (make,), (counts_on,)),
    "volume create": Operation(make_volume, (), (volumes_are_whole,)),
    "volume snapshot": Operation(snapshot_volume, (make_volume,), (volumes_are_whole,)),
}


async def run(daemon: Daemon, steps: tuple[Step, ...], scene: Scene) -> None:
    async with connected(daemon) as client:
        for step in steps:
            await step(client, scene)


@contextlib.contextmanager
def faulty(directory: Path, point: str, number: int, steps_file: Path) -> Iterator[Daemon | None]:
    """An agent that ends at a step; None if that came before it was ready."""
    argv = (sys.executable, "-m", "tests.support.faulty_agent", point, str(number), str(steps_file))
    steps_file.write_text("")
    try:
        daemon = start_daemon(directory, argv=argv, **KEEP)
    except AssertionError:
        yield None
        return
    try:
        yield daemon
    finally:
        if daemon.process.poll() is None:
            daemon.kill()


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


async def recorded(directory: Path, operation: Operation, steps_file: Path) -> dict[str, int]:
    """Returns the steps of an operation in order: names, and which of its kind since the agent's start is the first."""
    scene = Scene()
    with daemon_with(directory, keeps=True, **KEEP) as daemon:
        await run(daemon, (warm_up, *operation.prepare), scene)
    with faulty(directory, "-", 1, steps_file) as daemon:
        assert daemon is not None
        begun = 0 if operation.act is counts_on else len(lines(steps_file))
        await run(daemon, (operation.act,), scene)
        await asyncio.sleep(0.3)  # what is cleared up after the answer
        names = lines(steps_file)
    await cleared(directory, operation.check, scene)
    before = Counter(names[:begun])
    return {name: before[name] + 1 for name in names[begun:]}


async def warm_up(client: Client, _scene: Scene) -> None:
    """Makes the template, which is no part of any operation here."""
    async with client.sandbox(memory_bytes=256 * MIB, disk_bytes=64 * MIB):
        pass


async def cleared(directory: Path, checks: tuple[Step, ...], scene: Scene) -> None:
    """Has the next agent take over, checks what it found, and leaves nothing."""
    with daemon_with(directory, log__level="warning") as daemon:
        await run(daemon, checks, scene)


async def taken_over(directory: Path, operation: Operation, killed: Scene | None, following: Scene | None) -> None:
    """Has the next agent take over, checks what it found, removes that, and prepares for the next point."""
    with daemon_with(directory, keeps=True, **KEEP) as daemon:
        if killed is not None:
            await run(daemon, operation.check, killed)
            async with connected(daemon) as client:
                for sandbox in await listed(client):
                    await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=sandbox.id))
            assert daemon.left() == []
            assert list((directory / "state" / "volumes").glob(".*")) == []
        if following is not None:
            await run(daemon, operation.prepare, following)


@pytest.mark.parametrize("name", OPERATIONS)
async def test_an_agent_that_is_killed_at_any_step(name: str, directory: Path, reliability: Reliability) -> None:
    operation, steps_file = OPERATIONS[name], directory / "steps"
    points = await recorded(directory, operation, steps_file)
    assert len(points) > 1
    scene, last = Scene(), list(points)[-1]
    await taken_over(directory, operation, None, scene)
    for point, number in points.items():
        with faulty(directory, point, number, steps_file) as doomed:
            if doomed is not None:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await run(doomed, (operation.act,), scene)
                await asyncio.to_thread(doomed.process.wait, 10)
        following = None if point == last else Scene()
        try:
            await taken_over(directory, operation, scene, following)
        except BaseException as error:
            error.add_note(f"killed at {point} (number {number}) of {name}, or preparing for the one after it")
            raise
        scene = following or scene
    reliability.seen(
        f"SIGKILL of the agent at each of {len(points)} steps of {name}",
        "the next agent finds it done, or undoes or finishes it; no process inside notices",
        f"so at all {len(points)}: {', '.join(points)}",
    )
