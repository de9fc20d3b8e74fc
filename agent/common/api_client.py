"""Client side of the gRPC API: the stubs of all services on one channel, and the reasons of errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grpc

    from sandboxd.v1.file_pb2_grpc import FileServiceAsyncStub
    from sandboxd.v1.network_pb2_grpc import NetworkServiceAsyncStub
    from sandboxd.v1.node_pb2_grpc import ImageServiceAsyncStub, NodeServiceAsyncStub, TemplateServiceAsyncStub
    from sandboxd.v1.process_pb2_grpc import ProcessServiceAsyncStub
    from sandboxd.v1.sandbox_pb2_grpc import SandboxServiceAsyncStub
    from sandboxd.v1.volume_pb2_grpc import VolumeServiceAsyncStub

_MAX_MESSAGE_BYTES = 8 << 20  # the daemon's limit
OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
)
# Detects a network that drops packets silently; the daemon allows one ping every 10 s.
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True, slots=True)
class Api:
    """Stubs of all services on one channel."""

    sandboxes: SandboxServiceAsyncStub
    processes: ProcessServiceAsyncStub
    files: FileServiceAsyncStub
    network: NetworkServiceAsyncStub
    nodes: NodeServiceAsyncStub
    images: ImageServiceAsyncStub
    templates: TemplateServiceAsyncStub
    volumes: VolumeServiceAsyncStub


def opened(method: Any) -> Any:
    """Start a streaming call whose requests are written one by one. (gRPC's type stubs demand an iterator.)"""
    return method()


def api_over(channel: Any) -> Api:
    """Return the stubs of all services on a channel."""
    from sandboxd.v1 import (
        file_pb2_grpc,
        network_pb2_grpc,
        node_pb2_grpc,
        process_pb2_grpc,
        sandbox_pb2_grpc,
        volume_pb2_grpc,
    )

    return Api(
        sandboxes=sandbox_pb2_grpc.SandboxServiceStub(channel),
        processes=process_pb2_grpc.ProcessServiceStub(channel),
        files=file_pb2_grpc.FileServiceStub(channel),
        network=network_pb2_grpc.NetworkServiceStub(channel),
        nodes=node_pb2_grpc.NodeServiceStub(channel),
        images=node_pb2_grpc.ImageServiceStub(channel),
        templates=node_pb2_grpc.TemplateServiceStub(channel),
        volumes=volume_pb2_grpc.VolumeServiceStub(channel),
    )


def error_info(error: grpc.aio.AioRpcError) -> tuple[str, dict[str, str]]:
    """Return (reason, metadata) of a failed call's ErrorInfo (agent/daemon/rpc/status.py); ("", {}) without one."""
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # has what a grpc.Call has
    except ValueError:
        status = None
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status is not None else ():
        if detail.Unpack(info):
            return info.reason, dict(info.metadata)
    return "", {}


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Return the reason of a failed call, such as "SANDBOX_NOT_FOUND"; "" without one."""
    return error_info(error)[0]


def is_cut_off(error: grpc.aio.AioRpcError) -> bool:
    """Return whether grpc.aio lost the call's status: it reports this one if a write fails before the status came."""
    return error.code().name == "INTERNAL" and error.details() == "Internal error from Core"
