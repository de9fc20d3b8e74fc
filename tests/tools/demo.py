"""The main job, shown: a daemon of one's own, a microVM created over gRPC, `ls -lh /` run in it, and nothing left.

`just demo`. Exit status 0 only if every step worked and nothing of it remains on the host.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time

from sandboxd.v1 import node_pb2, sandbox_pb2
from tests.support import leaks
from tests.support.client import Client
from tests.support.daemon import Daemon, connected, start_daemon

_BAR = 40


def _say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def _show_phases(sandbox: sandbox_pb2.Sandbox) -> None:
    """Prints each phase with a bar as long as its share of the whole create, which is the last entry."""
    times = [(phase.name, phase.duration.ToTimedelta().total_seconds()) for phase in sandbox.phases]
    total = max(seconds for _, seconds in times)
    for name, seconds in times:
        bar = "#" * max(1, round(seconds / total * _BAR))
        print(f"  {name:<16} {seconds * 1000:9.1f} ms  {bar}")


async def _command(client: Client, sandbox_id: str, *argv: str) -> None:
    start = time.perf_counter()
    result = await client.run(sandbox_id, *argv)
    took_ms = (time.perf_counter() - start) * 1000
    print(f"$ {' '.join(argv)}\n{result.stdout.decode(errors='replace').rstrip()}\n({took_ms:.0f} ms)")
    if result.code != 0:
        raise SystemExit(f"{argv[0]} ended with status {result.code}: {result.stderr.decode(errors='replace')}")


async def _show(daemon: Daemon) -> None:
    async with connected(daemon) as client:
        node = await client.nodes.GetNode(node_pb2.GetNodeRequest())
        print(f"node {node.name}: {node.vmm} {node.vmm_version}, {node.accelerator} ({node.vmm_reason})")
        _say("Creating a sandbox over gRPC")
        async with client.sandbox() as sandbox:
            print(f"{sandbox.id}: {sandbox.memory_bytes >> 20} MiB, image {sandbox.image}, {sandbox.vmm}")
            _show_phases(sandbox)
            _say("Running processes in it")
            await _command(client, sandbox.id, "ls", "-lh", "/")
            await _command(client, sandbox.id, "uname", "-srvm")
            _say("Deleting it")
            start = time.perf_counter()
            await client.sandboxes.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=sandbox.id))
            print(f"deleted in {(time.perf_counter() - start) * 1000:.0f} ms")


def main() -> int:
    """Runs the demo; returns the exit status."""
    os.environ.setdefault(leaks.MARK, str(os.getpid()))
    before = leaks.snapshot()
    directory = leaks.make_directory()
    try:
        _say("Starting sandboxd")
        daemon = start_daemon(directory)
        try:
            asyncio.run(_show(daemon))
        finally:
            status = daemon.stop()
    finally:
        shutil.rmtree(directory)
    left = leaks.wait_for_leaks(before).describe()
    print("nothing is left: no process, namespace, interface, mount or directory" if not left else f"left: {left}")
    return 1 if left or status else 0


if __name__ == "__main__":
    sys.exit(main())
