"""The API over its real sockets, with a fake host behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import grpc

from agent.daemon.rpc.server import ApiServer
from sandboxd.v1 import process_pb2
from tests.support.client import Client, reason
from tests.support.daemon_fakes import Bench

ID = "sbx-0000000000000000"
PROCESS = {
    "id": 1, "pid": 7, "argv": ["x"], "user": "sandbox", "cwd": "/", "start_ns": 1, "tty": False, "exit": None,
}  # fmt: skip
EXITED = {"exit": {"code": 3, "signal": 0, "signal_name": "", "oom": False}}


@dataclasses.dataclass
class Api:
    node: Bench
    server: ApiServer
    client: Client
    channel: grpc.aio.Channel


def failed(code: grpc.StatusCode, why: str, error: grpc.aio.AioRpcError) -> None:
    assert (error.code(), reason(error)) == (code, why)


async def exec_messages(*later: Any) -> AsyncIterator[process_pb2.ExecRequest]:
    (sandbox_id, *requests) = later
    spec = process_pb2.ProcessSpec(argv=["x"], stdin=process_pb2.ProcessSpec.STDIN_PIPE)
    yield process_pb2.ExecRequest(start=process_pb2.ExecRequest.Start(sandbox_id=sandbox_id, spec=spec))
    for request in requests:
        yield request
