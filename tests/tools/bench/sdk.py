"""What the gateway and the official JavaScript SDK add to the same work through gRPC: creates, `sh`, files."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.gateway.sandboxes.ids import from_sdk
from sandboxd.v1 import file_pb2, node_pb2, sandbox_pb2
from tests.sdk.node_sdk import SDK, install
from tests.support import gateway as gateways
from tests.support.client import MIB, Client
from tests.support.gateway import ORG, Gateway
from tests.tools.bench.figures import Better, Figure, Range
from tests.tools.bench.harness import Report, describe_machine, own_daemon

FIGURES: tuple[Figure, ...] = (
    Figure("create_added_ms", "ms", "what a caller waits beyond the agent's work, through the SDK less through gRPC",
           range=Range.DIFFERENCE),
    Figure("sh_added_ms", "ms", "sh`true` through the SDK, less bash -c true through gRPC", range=Range.DIFFERENCE),
    Figure("upload_vs_grpc", "ratio", "rate of a 64 MiB file written through the SDK, over gRPC's", Better.HIGHER),
    Figure("download_vs_grpc", "ratio", "rate of a 64 MiB file read through the SDK, over gRPC's", Better.HIGHER),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What one round does each way."""

    file_bytes: int
    commands: int
    creates: int


_SIZES, _SMALL_SIZES = _Sizes(64 * MIB, 21, 3), _Sizes(4 * MIB, 3, 1)
_PATH = "bench"
_BLOCK = bytes(range(256)) * 1024
_MEMORY_BYTES = 768 * MIB
_ENV = {"BASH_ENV": "$HOME/.bashrc"}  # as the SDK's shell has it


class _Sdk:
    """The SDK in a process of node's own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    @asynccontextmanager
    async def running(cls, gateway: Gateway, sizes: _Sizes) -> AsyncIterator[_Sdk]:
        process = await asyncio.create_subprocess_exec(
            Path(sys.executable).parent / "node", Path(__file__).with_suffix(".mjs"), SDK, str(sizes.file_bytes),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=gateway.client_env(),
        )  # fmt: skip
        try:
            yield cls(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()

    async def do(self, what: str) -> tuple[float, str]:
        """Returns the milliseconds that it took, and the sandbox's id."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{what}\n".encode())
        took, sdk_id = (await stdout.readline()).decode().split()
        return float(took), sdk_id


def _request() -> sandbox_pb2.CreateSandboxRequest:
    request = sandbox_pb2.CreateSandboxRequest(image="minimal", vcpus=1, memory_bytes=_MEMORY_BYTES, tenant=ORG)
    request.lifetime.lease.FromSeconds(60)
    return request


async def _timed(work: Awaitable[object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = await work
    return (time.perf_counter() - start) * 1000, result


async def _upload(client: Client, sandbox_id: str, size_bytes: int) -> None:
    async def messages() -> AsyncIterator[file_pb2.WriteFileRequest]:
        yield file_pb2.WriteFileRequest(
            open=file_pb2.WriteFileRequest.Open(sandbox_id=sandbox_id, path=_PATH, user="sandbox")
        )
        for _ in range(size_bytes // len(_BLOCK)):
            yield file_pb2.WriteFileRequest(data=_BLOCK)

    await client.files.WriteFile(messages())


async def _download(client: Client, sandbox_id: str, size_bytes: int) -> None:
    size = 0
    async for piece in client.files.ReadFile(file_pb2.ReadFileRequest(sandbox_id=sandbox_id, path=_PATH)):
        size += len(piece.data)
    assert size == size_bytes


async def _creates(report: Report, client: Client, sdk: _Sdk) -> None:
    """One of each, one VM at a time: what a second one does would be in the way.

    A create under emulation takes 50 ms more or less from one to the next, so what is compared is the time that the
    caller waits beyond the agent's own work on it.
    """
    took, created = await _timed(client.sandboxes.CreateSandbox(_request()))
    assert isinstance(created, sandbox_pb2.Sandbox)
    report.add("create through gRPC, ms", took)
    report.add("of it beyond the agent's work (gRPC), ms", took - _agent_ms(created))
    await client.sandboxes.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=created.id))
    took, sdk_id = await sdk.do("create")
    made = await client.sandboxes.GetSandbox(sandbox_pb2.GetSandboxRequest(id=from_sdk(sdk_id) or ""))
    report.add("create through the SDK, ms", took)
    report.add("of it beyond the agent's work (SDK), ms", took - _agent_ms(made))
    await sdk.do("kill")


def _agent_ms(sandbox: sandbox_pb2.Sandbox) -> float:
    """Returns what the agent says that the create took."""
    (create,) = (phase for phase in sandbox.phases if phase.name == "create")
    return create.duration.ToTimedelta().total_seconds() * 1000


async def _work(report: Report, client: Client, sdk: _Sdk, sizes: _Sizes) -> None:
    """The same work both ways, in the same sandbox."""
    _took, sdk_id = await sdk.do("create")
    sandbox_id = from_sdk(sdk_id)
    assert sandbox_id is not None
    for number in range(sizes.commands):
        into = report if number else Report()  # the first ones warm the guest up
        into.add("sh through gRPC, ms", (await _timed(client.run(sandbox_id, "bash", "-c", "true", env=_ENV)))[0])
        into.add("sh through the SDK, ms", (await sdk.do("sh"))[0])
    for name, work in (("upload", _upload), ("download", _download)):
        report.add(f"{name} through gRPC, ms", (await _timed(work(client, sandbox_id, sizes.file_bytes)))[0])
        report.add(f"{name} through the SDK, ms", (await sdk.do(name))[0])
    await sdk.do("kill")


async def measure(report: Report) -> None:
    """Measure the same work through the SDK and through gRPC, in turns; see FIGURES."""
    sizes = _SMALL_SIZES if report.small else _SIZES
    install()
    async with own_daemon(node__region="loc") as (daemon, client):
        await describe_machine(report, client)
        await client.templates.PrepareTemplate(
            node_pb2.PrepareTemplateRequest(image="minimal", vcpus=1, memory_bytes=_MEMORY_BYTES)
        )
        with gateways.running(daemon, daemon.directory / "gateway", image="minimal", vcpus="1") as gateway:
            async with _Sdk.running(gateway, sizes) as sdk:
                for number in range(1 if report.small else 0, report.rounds + 1):
                    into = report if number else Report()  # what is done for the first time is not counted
                    for _ in range(sizes.creates):
                        await _creates(into, client, sdk)
                    await _work(into, client, sdk, sizes)
    for figure, name in (("create", "of it beyond the agent's work ({}), ms"), ("sh", "sh through {}, ms")):
        ways = ("SDK", "gRPC") if figure == "create" else ("the SDK", "gRPC")
        added = report.median(name.format(ways[0])) - report.median(name.format(ways[1]))
        report.figures[f"{figure}_added_ms"] = added
    for name in ("upload", "download"):
        ratio = report.median(f"{name} through gRPC, ms") / report.median(f"{name} through the SDK, ms")
        report.figures[f"{name}_vs_grpc"] = ratio
