"""Rates of standard output and input through gRPC, over the raw rates of the same VM's link, in turns."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from sandboxd.v1 import process_pb2
from tests.support.client import MIB
from tests.tools.bench.harness import Target
from tests.tools.bench.rawport import raw_port

_SIZE_BYTES = 64 * MIB
_BLOCK = bytes(256 << 10)


async def _stdout_rate(target: Target) -> float:
    """Returns MiB/s from the first byte to the exit."""
    argv = ["dd", "if=/dev/zero", f"bs={len(_BLOCK)}", f"count={_SIZE_BYTES // len(_BLOCK)}", "status=none"]
    spec = process_pb2.ProcessSpec(argv=argv)
    start_message = process_pb2.ExecRequest(start=process_pb2.ExecRequest.Start(sandbox_id=target.id, spec=spec))

    async def messages() -> AsyncIterator[process_pb2.ExecRequest]:
        yield start_message

    begun, size = 0.0, 0
    async for response in target.client.processes.Exec(messages()):
        begun = begun or (time.perf_counter() if response.stdout else 0.0)
        size += len(response.stdout)
    assert size == _SIZE_BYTES
    return size / MIB / (time.perf_counter() - begun)


async def _stdin_rate(target: Target) -> float:
    """Returns MiB/s from the first byte to the exit of a program that reads it all."""
    argv = ["dd", "of=/dev/null", f"bs={len(_BLOCK)}", "status=none"]
    spec = process_pb2.ProcessSpec(argv=argv, stdin=process_pb2.ProcessSpec.STDIN_PIPE)
    begun = 0.0

    async def messages() -> AsyncIterator[process_pb2.ExecRequest]:
        nonlocal begun
        yield process_pb2.ExecRequest(start=process_pb2.ExecRequest.Start(sandbox_id=target.id, spec=spec))
        begun = time.perf_counter()
        for _ in range(_SIZE_BYTES // len(_BLOCK)):
            yield process_pb2.ExecRequest(stdin=_BLOCK)

    async for _ in target.client.processes.Exec(messages()):
        pass
    return _SIZE_BYTES / MIB / (time.perf_counter() - begun)


async def measure(target: Target) -> None:
    """Adds `stdout_vs_link` and `stdin_vs_link`: at most 1 for a link that is used to the full.

    `pipe_vs_link` and `feed_vs_link` are what stdout and stdin could reach if agent, calls and replay cost nothing: the
    process writes into, or reads from, a pipe, and a bare loop moves the bytes between pipe and link.
    """
    report = target.report
    async with raw_port(target) as port:
        for _ in range(target.rounds):
            report.add("raw link from the guest, MiB/s", await port.from_guest(_SIZE_BYTES))
            report.add("a process's output spliced to the raw link, MiB/s", await port.from_pipe(_SIZE_BYTES))
            report.add("stdout, MiB/s", await _stdout_rate(target))
            report.add("raw link to the guest, MiB/s", await port.to_guest(_SIZE_BYTES))
            report.add("the raw link into a process's pipe, MiB/s", await port.to_pipe(_SIZE_BYTES))
            report.add("stdin, MiB/s", await _stdin_rate(target))
    from_guest, to_guest = (report.median(f"raw link {way} the guest, MiB/s") for way in ("from", "to"))
    report.figures["stdout_vs_link"] = report.median("stdout, MiB/s") / from_guest
    piped = report.median("a process's output spliced to the raw link, MiB/s")
    report.figures["pipe_vs_link"] = piped / from_guest
    report.figures["stdin_vs_link"] = report.median("stdin, MiB/s") / to_guest
    report.figures["feed_vs_link"] = report.median("the raw link into a process's pipe, MiB/s") / to_guest
