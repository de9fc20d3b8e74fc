"""The way to the daemon: its address, the channel, the stubs."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from agent.cli import options
from agent.cli.errors import CliError, unreachable
from agent.common.api_client import KEEPALIVE, OPTIONS, Api, api_over
from agent.common.errors import AgentError

if TYPE_CHECKING:
    import grpc


def address() -> str:
    """Returns "unix:PATH" or "HOST:PORT": the one given, or the unix socket of the settings.

    :raises CliError: no such form. :raises ConfigError: the settings are wrong.
    """
    from agent.common.config.addresses import split_address
    from agent.common.config.loading import load
    from agent.common.errors import ConfigError

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

    from agent.common.config.addresses import split_address

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
        return grpc.aio.secure_channel(target, _tls(given), options=(*OPTIONS, *KEEPALIVE))
    if any(parts) or not (given.insecure and _is_loopback(target)):
        raise CliError(
            f"TCP to {target} needs --tls-ca, --tls-cert and --tls-key; --insecure does without, on loopback alone",
            reason="TLS_NEEDED",
            status=2,
        )
    return grpc.aio.insecure_channel(target, options=(*OPTIONS, *KEEPALIVE))


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
        channel = grpc.aio.insecure_channel(target, options=OPTIONS)
    else:
        channel = _tcp_channel(target)
    async with channel:
        yield api_over(channel)
