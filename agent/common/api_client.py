"""The gRPC API as its clients see it: the stubs of all services over one channel."""

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

_MAX_MESSAGE_BYTES = 8 << 20  # what the daemon allows
OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
)
# A network that falls silent is noticed; the daemon allows a ping every 10 s.
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True, slots=True)
class Api:
    """Stubs of all services."""

    sandboxes: SandboxServiceAsyncStub
    processes: ProcessServiceAsyncStub
    files: FileServiceAsyncStub
    network: NetworkServiceAsyncStub
    nodes: NodeServiceAsyncStub
    images: ImageServiceAsyncStub
    templates: TemplateServiceAsyncStub
    volumes: VolumeServiceAsyncStub


def opened(method: Any) -> Any:
    """Opens a call whose requests are written one by one; grpc takes no iterator then, its type stubs demand one."""
    return method()


def api_over(channel: Any) -> Api:
    """Returns the stubs over a channel."""
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
    """Returns reason and metadata of a failed call's ErrorInfo (see agent/daemon/rpc/status.py); "" if it has none."""
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
    """Returns the reason of a failed call, such as "SANDBOX_NOT_FOUND"; "" if the daemon gave none."""
    return error_info(error)[0]


def is_cut_off(error: grpc.aio.AioRpcError) -> bool:
    """Whether a call's own status was lost: grpc.aio puts this in its place if a write fails before it looked."""
    return error.code().name == "INTERNAL" and error.details() == "Internal error from Core"
