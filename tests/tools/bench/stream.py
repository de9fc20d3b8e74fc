"""Rates of standard output and input through gRPC, over the raw rates of the same VM's link, in turns."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from sandboxd.v1 import process_pb2
from tests.support.client import MIB
from tests.tools.bench.figures import Better, Figure
from tests.tools.bench.harness import Target
from tests.tools.bench.rawport import raw_port

# A rate over the raw link's rate: at most 1 for a link that is used to the full. The references are what stdout and
# stdin could reach if agent, calls and replay cost nothing: the process writes into, or reads from, a pipe, and a bare
# loop moves the bytes between pipe and link.
FIGURES: tuple[Figure, ...] = (
    Figure("stdout_vs_link", "ratio", "a process's output at the client, over the raw link", Better.HIGHER),
    Figure("pipe_vs_link", "ratio", "a process's output spliced to the link, over the raw link", Better.NEITHER),
    Figure("stdin_vs_link", "ratio", "a process's input from the client, over the raw link", Better.HIGHER),
    Figure("feed_vs_link", "ratio", "a bare loop from link to a process's pipe, over the raw link", Better.NEITHER),
)
_SIZE_BYTES, _SMALL_BYTES = 64 * MIB, 4 * MIB
_BLOCK = bytes(256 << 10)


async def _stdout_rate(target: Target, size_bytes: int) -> float:
    """Return MiB/s from the first byte to the exit."""
    argv = ["dd", "if=/dev/zero", f"bs={len(_BLOCK)}", f"count={size_bytes // len(_BLOCK)}", "status=none"]
    spec = process_pb2.ProcessSpec(argv=argv)
    start_message = process_pb2.ExecRequest(start=process_pb2.ExecRequest.Start(sandbox_id=target.id, spec=spec))

    async def messages() -> AsyncIterator[process_pb2.ExecRequest]:
        yield start_message

    begun, size = 0.0, 0
    async for response in target.client.processes.Exec(messages()):
        begun = begun or (time.perf_counter() if response.stdout else 0.0)
        size += len(response.stdout)
    assert size == size_bytes
    return size / MIB / (time.perf_counter() - begun)


async def _stdin_rate(target: Target, size_bytes: int) -> float:
    """Return MiB/s from the first byte to the exit of a program that reads it all."""
    argv = ["dd", "of=/dev/null", f"bs={len(_BLOCK)}", "status=none"]
    spec = process_pb2.ProcessSpec(argv=argv, stdin=process_pb2.ProcessSpec.STDIN_PIPE)
    begun = 0.0

    async def messages() -> AsyncIterator[process_pb2.ExecRequest]:
        nonlocal begun
        yield process_pb2.ExecRequest(start=process_pb2.ExecRequest.Start(sandbox_id=target.id, spec=spec))
        begun = time.perf_counter()
        for _ in range(size_bytes // len(_BLOCK)):
            yield process_pb2.ExecRequest(stdin=_BLOCK)

    async for _ in target.client.processes.Exec(messages()):
        pass
    return size_bytes / MIB / (time.perf_counter() - begun)


async def measure(target: Target) -> None:
    """Measure each way through the agent and through the bare link, in turns; see FIGURES."""
    report = target.report
    size_bytes = _SMALL_BYTES if report.small else _SIZE_BYTES
    async with raw_port(target) as port:
        for _ in range(report.rounds):
            report.add("raw link from the guest, MiB/s", await port.from_guest(size_bytes))
            report.add("a process's output spliced to the raw link, MiB/s", await port.from_pipe(size_bytes))
            report.add("stdout, MiB/s", await _stdout_rate(target, size_bytes))
            report.add("raw link to the guest, MiB/s", await port.to_guest(size_bytes))
            report.add("the raw link into a process's pipe, MiB/s", await port.to_pipe(size_bytes))
            report.add("stdin, MiB/s", await _stdin_rate(target, size_bytes))
    from_guest, to_guest = (report.median(f"raw link {way} the guest, MiB/s") for way in ("from", "to"))
    report.figures["stdout_vs_link"] = report.median("stdout, MiB/s") / from_guest
    piped = report.median("a process's output spliced to the raw link, MiB/s")
    report.figures["pipe_vs_link"] = piped / from_guest
    report.figures["stdin_vs_link"] = report.median("stdin, MiB/s") / to_guest
    report.figures["feed_vs_link"] = report.median("the raw link into a process's pipe, MiB/s") / to_guest
