"""A small client of the API, as a user would write it from the protos."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from sandboxd.v1 import (
    file_pb2_grpc,
    network_pb2_grpc,
    node_pb2_grpc,
    process_pb2,
    process_pb2_grpc,
    sandbox_pb2,
    sandbox_pb2_grpc,
    volume_pb2_grpc,
)

MIB = 1 << 20


@dataclass
class Result:
    """How a command ended and what it wrote."""

    stdout: bytes
    stderr: bytes
    exit: process_pb2.Exit

    @property
    def code(self) -> int:
        return self.exit.exit_code


class Client:
    """Stubs of every service, and the two calls that tests make all the time."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.sandboxes = sandbox_pb2_grpc.SandboxServiceStub(channel)
        self.processes = process_pb2_grpc.ProcessServiceStub(channel)
        self.files = file_pb2_grpc.FileServiceStub(channel)
        self.network = network_pb2_grpc.NetworkServiceStub(channel)
        self.nodes = node_pb2_grpc.NodeServiceStub(channel)
        self.images = node_pb2_grpc.ImageServiceStub(channel)
        self.templates = node_pb2_grpc.TemplateServiceStub(channel)
        self.volumes = volume_pb2_grpc.VolumeServiceStub(channel)

    @asynccontextmanager
    async def sandbox(self, **fields: Any) -> AsyncIterator[sandbox_pb2.Sandbox]:
        """A sandbox that is deleted in the end."""
        request = sandbox_pb2.CreateSandboxRequest(**{"memory_bytes": 256 * MIB, **fields})
        created = await self.sandboxes.CreateSandbox(request)
        try:
            yield created
        finally:
            await self.sandboxes.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=created.id, allow_missing=True))

    async def run(self, sandbox_id: str, *argv: str, stdin: bytes | None = None, **fields: Any) -> Result:
        """Runs a command to its end."""
        kind = process_pb2.ProcessSpec.STDIN_NULL if stdin is None else process_pb2.ProcessSpec.STDIN_PIPE
        spec = process_pb2.ProcessSpec(argv=argv, stdin=kind, **fields)

        async def messages() -> AsyncIterator[process_pb2.ExecRequest]:
            yield process_pb2.ExecRequest(start=process_pb2.ExecRequest.Start(sandbox_id=sandbox_id, spec=spec))
            for start in range(0, len(stdin or b""), 512 << 10):
                yield process_pb2.ExecRequest(stdin=(stdin or b"")[start : start + (512 << 10)])

        out, err = bytearray(), bytearray()
        async for response in self.processes.Exec(messages()):
            out += response.stdout
            err += response.stderr
            if response.HasField("exit"):
                return Result(bytes(out), bytes(err), response.exit)
        raise AssertionError("the stream ended without an exit")

    async def slowest_beside(self, sandbox_id: str, doing: asyncio.Task[Any], pause_s: float = 0.05) -> float:
        """Has a sandbox run programs until a task is done; returns the longest that one took, in seconds."""
        slowest = 0.0
        while not doing.done():
            start = time.monotonic()
            assert (await self.run(sandbox_id, "true")).code == 0
            slowest = max(slowest, time.monotonic() - start)
            await asyncio.sleep(pause_s)
        return slowest


def reason(error: grpc.aio.AioRpcError) -> str:
    """Returns the ErrorInfo reason of a failed call."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # has what a grpc.Call has
    info = error_details_pb2.ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    return str(info.reason)
