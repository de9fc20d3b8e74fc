"""A restart of the agent with many sandboxes: it is killed, and the next one on the same directories takes over.

In each sandbox a program prints a line now and then; it is waited for, and its output read, after the restart.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from sandboxd.v1 import process_pb2, sandbox_pb2
from tests.support import leaks
from tests.support.client import MIB, Client
from tests.support.daemon import Daemon, connected, start_daemon
from tests.tools.bench.figures import Better, Figure, Range
from tests.tools.bench.harness import Report, describe_machine

FIGURES: tuple[Figure, ...] = (
    Figure("adopted", "sandboxes", "sandboxes in which an exec works after each restart, of 50", Better.HIGHER,
           Range.COUNT),
    Figure("lost", "sandboxes", "sandboxes in which no exec works after a restart, of 50", range=Range.COUNT),
    Figure("ready_s", "s", "start of the new agent to the answer to a first exec"),
    Figure("all_ready_s", "s", "start of the new agent to the answers to an exec in every sandbox"),
)  # fmt: skip
_SANDBOXES, _SMALL_SANDBOXES = 50, 3
_AT_ONCE = 4
_SETTINGS = {
    "log__level": "warning", "sandbox__on_stop": "keep", "node__max_sandboxes": "100", "node__memory_overcommit": "8",
    "node__cpu_overcommit": "100",
}  # fmt: skip
# Goes on until it is told to end; its count would begin again if anything had been started anew. A shell would start a
# `sleep` each second, and fifty of these are all that two emulating cores can do.
_PROGRAM = """
import os, sys, time
count = 0
while not os.path.exists("/tmp/end"):
    count += 1
    print(count, os.getpid(), flush=True)
    time.sleep(1)
sys.exit(7)
"""


async def measure(report: Report) -> None:
    """Kill the agent and start the next one, up to three times; see FIGURES."""
    directory = leaks.make_directory()
    daemon = start_daemon(directory, **_SETTINGS)
    try:
        async with connected(daemon) as client:
            await describe_machine(report, client)
            ids = await _filled(client, _SMALL_SANDBOXES if report.small else _SANDBOXES)
            processes = {sandbox_id: await _start(client, sandbox_id) for sandbox_id in ids}
        adopted = set(ids)
        for _ in range(min(report.rounds, 3)):
            daemon.kill()
            daemon, found = await _restarted(report, directory, ids)
            adopted &= found
        await _end(daemon, processes, report)
        report.figures |= {
            "adopted": len(adopted), "lost": len(ids) - len(adopted), "ready_s": report.median("ready s"),
            "all_ready_s": report.median("all ready s"),
        }  # fmt: skip
    finally:
        if daemon.process.poll() is None:
            daemon.kill()
        daemon = start_daemon(directory, **(_SETTINGS | {"sandbox__on_stop": "delete"}))
        daemon.stop()
        sys.stderr.write(daemon.log)
        shutil.rmtree(directory)


async def _filled(client: Client, count: int) -> list[str]:
    room = asyncio.Semaphore(_AT_ONCE)

    async def create() -> str:
        async with room:
            request = sandbox_pb2.CreateSandboxRequest(memory_bytes=128 * MIB, disk_bytes=16 * MIB)
            return str((await client.sandboxes.CreateSandbox(request)).id)

    return list(await asyncio.gather(*(create() for _ in range(count))))


async def _start(client: Client, sandbox_id: str) -> int:
    spec = process_pb2.ProcessSpec(argv=["python3", "-I", "-c", _PROGRAM])
    request = process_pb2.StartProcessRequest(sandbox_id=sandbox_id, spec=spec)
    return int((await client.processes.StartProcess(request)).process_id)


async def _restarted(report: Report, directory: Path, ids: list[str]) -> tuple[Daemon, set[str]]:
    """Returns the new agent and the sandboxes in which an exec works."""
    start = time.monotonic()
    daemon = await asyncio.to_thread(lambda: start_daemon(directory, **_SETTINGS))
    async with connected(daemon) as client:
        first: list[float] = []

        async def exec_in(sandbox_id: str) -> str:
            try:
                code = (await client.run(sandbox_id, "true")).code
            except grpc.aio.AioRpcError:
                return ""
            first.append(time.monotonic() - start)
            return sandbox_id if code == 0 else ""

        found = set(await asyncio.gather(*(exec_in(sandbox_id) for sandbox_id in ids))) - {""}
    report.add("ready s", min(first))
    report.add("all ready s", max(first))
    return daemon, found


async def _end(daemon: Daemon, processes: dict[str, int], report: Report) -> None:
    """Checks that no process has noticed: its output has no gap, and its exit is its own."""
    async with connected(daemon) as client:
        for sandbox_id, process_id in processes.items():
            await client.run(sandbox_id, "touch", "/tmp/end")
            request = process_pb2.WaitRequest(sandbox_id=sandbox_id, process_id=process_id)
            ended = (await client.processes.Wait(request)).exit
            lines = await _output(client, sandbox_id, process_id)
            counts, pids = zip(*(line.split() for line in lines), strict=True)
            undisturbed = [int(count) for count in counts] == list(range(1, len(counts) + 1)) and len(set(pids)) == 1
            if ended.exit_code != 7 or not undisturbed:
                raise SystemExit(f"a process in {sandbox_id} noticed: exit {ended}, {len(lines)} lines")
            report.add("lines of output", len(lines))


async def _output(client: Client, sandbox_id: str, process_id: int) -> list[str]:
    async def messages() -> AsyncIterator[process_pb2.AttachRequest]:
        opened = process_pb2.AttachRequest.Open(sandbox_id=sandbox_id, process_id=process_id)
        yield process_pb2.AttachRequest(open=opened)

    data = b""
    async for response in client.processes.Attach(messages()):
        data += response.stdout
    return data.decode().splitlines()
