"""How much an exec adds to what the guest itself takes to start a program and wait for it.

A Python process in the guest starts /bin/true and waits for it: by fork(2), and by posix_spawn(3), which is the
cheapest way there is, with the same descriptors as an exec has. A client does the same through gRPC. All in turns, so
that noise hits all of them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

from sandboxd.v1 import process_pb2
from tests.tools.bench.figures import Figure, Range
from tests.tools.bench.harness import Target

FIGURES: tuple[Figure, ...] = (
    Figure(
        "exec_added_ms", "ms",
        "exec of /bin/true by a client, less fork, exec and wait of a Python process in the guest",
        range=Range.DIFFERENCE,
    ),
    Figure(
        "exec_added_to_spawn_ms", "ms", "exec of /bin/true by a client, less posix_spawn and wait in the guest",
        range=Range.DIFFERENCE,
    ),
)  # fmt: skip
_WARM_UP, _SMALL_WARM_UP = 20, 2
_PER_ROUND = 5
# A line on standard input asks for one measurement; a line on standard output answers, in milliseconds.
_IN_GUEST = """
import os, sys, time
null = os.open("/dev/null", os.O_RDONLY)
for line in sys.stdin:
    if line == "fork\\n":
        start = time.perf_counter()
        pid = os.fork()
        if not pid:
            os.execv("/bin/true", ["/bin/true"])
        os.waitpid(pid, 0)
        print((time.perf_counter() - start) * 1000, flush=True)
        continue
    start = time.perf_counter()
    out, err = os.pipe(), os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, out[1], 1), (os.POSIX_SPAWN_DUP2, err[1], 2)]
    pid = os.posix_spawn("/bin/true", ["/bin/true"], os.environ, file_actions=actions, setsid=True)
    os.close(out[1]), os.close(err[1])
    os.read(out[0], 1), os.read(err[0], 1)
    os.waitpid(pid, 0)
    print((time.perf_counter() - start) * 1000, flush=True)
    os.close(out[0]), os.close(err[0])
"""


class _Guest:
    """The process in the guest that measures itself."""

    def __init__(self, target: Target) -> None:
        self._asked: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._call = target.client.processes.Exec(self._messages(target.id))

    async def _messages(self, sandbox_id: str) -> AsyncIterator[process_pb2.ExecRequest]:
        spec = process_pb2.ProcessSpec(
            argv=["python3", "-I", "-c", _IN_GUEST], stdin=process_pb2.ProcessSpec.STDIN_PIPE
        )
        yield process_pb2.ExecRequest(start=process_pb2.ExecRequest.Start(sandbox_id=sandbox_id, spec=spec))
        while (line := await self._asked.get()) is not None:
            yield process_pb2.ExecRequest(stdin=line)

    async def measure(self, how: str = "spawn") -> float:
        """Returns one measurement, in milliseconds: by posix_spawn(3), or by fork(2) if `how` is "fork"."""
        self._asked.put_nowait(f"{how}\n".encode())
        async for response in self._call:
            if response.stdout:
                return float(json.loads(response.stdout))
            if response.stderr:
                raise SystemExit(response.stderr.decode())
        raise SystemExit("the process in the guest ended")

    async def aclose(self) -> None:
        self._asked.put_nowait(None)
        async for _ in self._call:
            pass


async def measure(target: Target) -> None:
    """Measure an exec beside the same in the guest; see FIGURES."""
    report = target.report
    guest = _Guest(target)
    for _ in range(_SMALL_WARM_UP if report.small else _WARM_UP):
        await guest.measure()
        await target.client.run(target.id, "/bin/true")
    for _ in range(report.rounds * _PER_ROUND):
        report.add("posix_spawn and wait in the guest, ms", await guest.measure())
        report.add("fork, exec and wait in the guest, ms", await guest.measure("fork"))
        start = time.perf_counter()
        await target.client.run(target.id, "/bin/true")
        report.add("exec by a client, ms", (time.perf_counter() - start) * 1000)
    await guest.aclose()
    by_client = report.median("exec by a client, ms")
    report.figures["exec_added_ms"] = by_client - report.median("fork, exec and wait in the guest, ms")
    report.figures["exec_added_to_spawn_ms"] = by_client - report.median("posix_spawn and wait in the guest, ms")
