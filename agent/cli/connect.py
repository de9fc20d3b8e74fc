"""The way to the daemon: its address, the channel, the stubs."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.cli import options
from agent.cli.errors import CliError, unreachable
from agent.errors import AgentError

if TYPE_CHECKING:
    import grpc

    from sandboxd.v1.file_pb2_grpc import FileServiceAsyncStub
    from sandboxd.v1.network_pb2_grpc import NetworkServiceAsyncStub
    from sandboxd.v1.node_pb2_grpc import ImageServiceAsyncStub, NodeServiceAsyncStub, TemplateServiceAsyncStub
    from sandboxd.v1.process_pb2_grpc import ProcessServiceAsyncStub
    from sandboxd.v1.sandbox_pb2_grpc import SandboxServiceAsyncStub

_MAX_MESSAGE_BYTES = 8 << 20  # what the daemon allows
_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
)
# A network that falls silent is noticed; the daemon allows a ping every 10 s.
_KEEPALIVE = (
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


def address() -> str:
    """Returns "unix:PATH" or "HOST:PORT": the one given, or the unix socket of the settings.

    :raises CliError: no such form. :raises ConfigError: the settings are wrong.
    """
    from agent.config import ConfigError, load, split_address

    given = options.current().address
    if not given:
        settings = load()
        return f"unix:{settings.api.unix_socket or settings.paths.run_dir / 'sandboxd.sock'}"
    if given.startswith("/"):
        given = f"unix:{given}"
    if given.startswith("unix:"):
        path = given.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise CliError(
                f"{given!r} names no absolute path; write unix:/path/to/socket", reason="INVALID_ADDRESS", status=2
            )
        return f"unix:{path}"
    try:
        host, port = split_address(given, "--address")
    except ConfigError as error:
        raise CliError(f"{error.message}, or unix:/path", reason="INVALID_ADDRESS", status=2) from None
    if not host or not port:
        raise CliError(f"{given!r} lacks a host or a port; write HOST:PORT", reason="INVALID_ADDRESS", status=2)
    return given


def described_address() -> str:
    """Returns the address for an error message."""
    try:
        return address()
    except AgentError:
        return options.current().address


def _is_loopback(target: str) -> bool:
    from ipaddress import ip_address

    from agent.config import split_address

    host, _ = split_address(target, "--address")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _tls(given: options.Options) -> grpc.ChannelCredentials:
    import grpc

    try:
        ca, cert, key = (Path(path).read_bytes() for path in (given.tls_ca, given.tls_cert, given.tls_key))
    except OSError as error:
        raise CliError(f"cannot read {error.filename}: {error.strerror}", reason="INVALID_TLS", status=2) from None
    return grpc.ssl_channel_credentials(ca, key, cert)


def _tcp_channel(target: str) -> grpc.aio.Channel:
    import grpc

    given = options.current()
    parts = (given.tls_ca, given.tls_cert, given.tls_key)
    if all(parts):
        return grpc.aio.secure_channel(target, _tls(given), options=(*_OPTIONS, *_KEEPALIVE))
    if any(parts) or not (given.insecure and _is_loopback(target)):
        raise CliError(
            f"TCP to {target} needs --tls-ca, --tls-cert and --tls-key; --insecure does without, on loopback alone",
            reason="TLS_NEEDED",
            status=2,
        )
    return grpc.aio.insecure_channel(target, options=(*_OPTIONS, *_KEEPALIVE))


def require_socket(target: str) -> None:
    """Ensures that something listens on the unix socket of "unix:PATH": gRPC's own words for that are long.

    :raises CliError: nothing does.
    """
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(target.removeprefix("unix:"))
        except OSError as error:
            raise unreachable(target, error.strerror or str(error)) from None


@asynccontextmanager
async def connected() -> AsyncIterator[Api]:
    """Yields the API. :raises CliError: there is no daemon, or the options do not lead to one."""
    target = address()
    # gRPC's library writes its own lines about failed connections.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import grpc

    if target.startswith("unix:"):
        require_socket(target)
        channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
    else:
        channel = _tcp_channel(target)
    async with channel:
        yield api_over(channel)


def opened(method: Any) -> Any:
    """Opens a call whose requests are written one by one; grpc takes no iterator then, its type stubs demand one."""
    return method()


def api_over(channel: Any) -> Api:
    """Returns the stubs over a channel."""
    from sandboxd.v1 import file_pb2_grpc, network_pb2_grpc, node_pb2_grpc, process_pb2_grpc, sandbox_pb2_grpc

    return Api(
        sandboxes=sandbox_pb2_grpc.SandboxServiceStub(channel),
        processes=process_pb2_grpc.ProcessServiceStub(channel),
        files=file_pb2_grpc.FileServiceStub(channel),
        network=network_pb2_grpc.NetworkServiceStub(channel),
        nodes=node_pb2_grpc.NodeServiceStub(channel),
        images=node_pb2_grpc.ImageServiceStub(channel),
        templates=node_pb2_grpc.TemplateServiceStub(channel),
    )
