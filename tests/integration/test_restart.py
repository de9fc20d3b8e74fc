"""An agent that ends, in order or not, and the next one on the same directories."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import subprocess
import time
from pathlib import Path

import grpc
import psutil
import pytest

from sandboxd.v1 import process_pb2
from sandboxd.v1 import sandbox_pb2 as pb
from tests.support import leaks
from tests.support.client import MIB, Client
from tests.support.daemon import Daemon, connected, daemon_with, refused, until
from tests.tools.reliability import Reliability

pytestmark = pytest.mark.vm

REQUEST = pb.CreateSandboxRequest(memory_bytes=256 * MIB, request_id="kept", labels={"a": "b"}, env={"KEPT": "yes"})


async def start(client: Client, sandbox_id: str, *argv: str) -> int:
    spec = process_pb2.ProcessSpec(argv=argv)
    request = process_pb2.StartProcessRequest(sandbox_id=sandbox_id, spec=spec)
    return int((await client.processes.StartProcess(request)).process_id)


async def wait(client: Client, sandbox_id: str, process_id: int) -> process_pb2.Exit:
    request = process_pb2.WaitRequest(sandbox_id=sandbox_id, process_id=process_id)
    return (await client.processes.Wait(request)).exit


async def adopted(daemon: Daemon, before: pb.Sandbox, process_id: int) -> None:
    """The sandbox is as it was, answers, and the process started under an earlier agent can be waited for."""
    async with connected(daemon) as client:
        now = await client.sandboxes.GetSandbox(pb.GetSandboxRequest(id=before.id))
        assert now == before
        assert (await client.run(before.id, "sh", "-c", "echo $KEPT")).stdout == b"yes\n"
        listing = await client.processes.ListProcesses(process_pb2.ListProcessesRequest(sandbox_id=before.id))
        assert process_id in [process.process_id for process in listing.processes]
        assert (await client.run(before.id, "touch", f"/tmp/{process_id}")).code == 0
        assert (await wait(client, before.id, process_id)).exit_code == 7
        assert await client.sandboxes.CreateSandbox(REQUEST) == before
        # The console is read on: it is one text over all agents.
        assert (await console(client, before.id)).count(b"sandboxd-init: configured") == 1


async def console(client: Client, sandbox_id: str) -> bytes:
    request = pb.GetConsoleRequest(id=sandbox_id)
    return b"".join([piece.data async for piece in client.sandboxes.GetConsole(request)])


def waiter(number: int) -> tuple[str, ...]:
    """A command that exits with 7 once the file /tmp/<number> exists."""
    return ("sh", "-c", f"until [ -e /tmp/{number} ]; do sleep 0.1; done; exit 7")


async def test_sandboxes_outlive_an_agent_that_is_killed_and_one_that_keeps_them(
    directory: Path, reliability: Reliability
) -> None:
    with daemon_with(directory, keeps=True, sandbox__on_stop="keep") as daemon:
        async with connected(daemon) as client:
            made = await client.sandboxes.CreateSandbox(REQUEST)
            assert [await start(client, made.id, *waiter(number)) for number in (1, 2)] == [1, 2]

            async def says_configured() -> bool:
                return b"sandboxd-init: configured" in await console(client, made.id)

            await until(says_configured)
        daemon.kill()
    with daemon_with(directory, keeps=True, sandbox__on_stop="keep") as daemon:
        await adopted(daemon, made, 1)
    assert any(made.id in path for path in daemon.left())
    with daemon_with(directory, sandbox__on_stop="delete") as daemon:
        await adopted(daemon, made, 2)
    reliability.seen(
        "SIGKILL of the agent, and an orderly restart",
        "sandboxes, processes, exit codes and output are taken over",
        "so",
    )


async def test_what_a_killed_agent_had_half_made_is_removed(directory: Path, reliability: Reliability) -> None:
    before = leaks.snapshot()
    with daemon_with(directory, keeps=True) as daemon:
        async with connected(daemon) as client:
            creating = client.sandboxes.CreateSandbox(REQUEST)

            async def booting() -> bool:
                return any((daemon.run_dir / "vm").glob("*/console.log"))

            await until(booting)
            (found,) = (await client.sandboxes.ListSandboxes(pb.ListSandboxesRequest())).sandboxes
            assert found.state == pb.Sandbox.STATE_CREATING
            daemon.kill()
            with pytest.raises(grpc.aio.AioRpcError):
                await creating
    assert found.id in leaks.snapshot().since(before).namespaces
    assert daemon.left() != []
    with daemon_with(directory) as daemon:
        assert daemon.left() == []
        assert found.id not in leaks.snapshot().namespaces
        async with connected(daemon) as client:
            with refused(grpc.StatusCode.NOT_FOUND, "SANDBOX_NOT_FOUND"):
                await client.sandboxes.GetSandbox(pb.GetSandboxRequest(id=found.id))
    reliability.seen(
        "SIGKILL of the agent during creates",
        "nothing of them is left",
        "so",
    )


async def test_a_damaged_state_file_is_rebuilt_from_what_lives(directory: Path, reliability: Reliability) -> None:
    with daemon_with(directory, keeps=True, sandbox__on_stop="keep") as daemon:
        async with connected(daemon) as client:
            made = await client.sandboxes.CreateSandbox(REQUEST)
            assert await start(client, made.id, *waiter(1)) == 1
        daemon.kill()
    for path in (directory / "state").glob("state.db*"):
        path.write_bytes(b"no database any more, and not short either" * 100)
    with daemon_with(directory) as daemon:
        async with connected(daemon) as client:
            assert await client.sandboxes.GetSandbox(pb.GetSandboxRequest(id=made.id)) == made
            assert (await client.run(made.id, "touch", "/tmp/1")).code == 0
            assert (await wait(client, made.id, 1)).exit_code == 7
        assert list((directory / "state").glob("state.db.damaged-*")) != []
        assert "records=1" in daemon.log or '"records": 1' in daemon.log
    reliability.seen(
        "the state file is damaged",
        "it is set aside, and rebuilt from the sandboxes' directories",
        "so: all sandboxes are there",
    )


@pytest.mark.parametrize("rebooted", [False, True])
async def test_what_ended_while_no_agent_ran_says_why(
    directory: Path, rebooted: bool, reliability: Reliability
) -> None:
    with daemon_with(directory, keeps=True, sandbox__on_stop="keep") as daemon:
        async with connected(daemon) as client:
            made = await client.sandboxes.CreateSandbox(REQUEST)
        daemon.kill()
    for process in psutil.process_iter():
        if process.name() == made.id[:15]:
            process.kill()
    if rebooted:  # as the host's end leaves it: no process, and nothing in /run
        with contextlib.closing(sqlite3.connect(directory / "state" / "state.db")) as db, db:
            db.execute("UPDATE facts SET value = 'another' WHERE name = 'boot_id'")
        shutil.rmtree(directory / "run" / "vm")
        await asyncio.to_thread(subprocess.run, ["ip", "netns", "del", made.id], check=True)
    with daemon_with(directory) as daemon:
        assert daemon.left() == []
        async with connected(daemon) as client:
            found = await client.sandboxes.GetSandbox(pb.GetSandboxRequest(id=made.id))
            assert found.state == pb.Sandbox.STATE_LOST
            assert found.error == ("the node was restarted" if rebooted else "its VM ended while no agent ran")
            assert 0 < found.expire_time.seconds - time.time() <= 3600
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "SANDBOX_NOT_RUNNING"):
                await client.run(made.id, "true")
            await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=made.id))
    reliability.seen(
        "sandboxes end while no agent runs",
        "they are LOST and say why: a restart of the node is told apart",
        "so",
    )
