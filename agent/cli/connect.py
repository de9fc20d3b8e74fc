"""Connection to the daemon: its address, the gRPC channel, and the errors of failed calls."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.cli import options
from agent.cli.errors import CliError, daemon_unreachable
from agent.common.api_client import KEEPALIVE, OPTIONS, Api, api_over, error_info
from agent.common.errors import AgentError, ConfigError

if TYPE_CHECKING:
    import grpc


def address() -> str:
    """Return the daemon's address as "unix:PATH" or "HOST:PORT": --address, or the unix socket of the settings.

    :raises CliError: --address has neither form.
    :raises ConfigError: --address was not given, and the settings are invalid.
    """
    from agent.common.config.addresses import split_address
    from agent.common.config.loading import load

    given = options.current().address
    if not given:
        settings = load()
        return f"unix:{settings.api.unix_socket or settings.paths.run_dir / 'sandboxd.sock'}"
    if given.startswith("/"):
        given = f"unix:{given}"
    if given.startswith("unix:"):
        path = given.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise _invalid_address(f"{given!r} has no absolute path; write unix:/path/to/socket")
        return f"unix:{path}"
    try:
        host, port = split_address(given, "--address")
    except ConfigError as error:
        raise _invalid_address(f"{error.message}, or unix:/path") from None
    if not host or not port:
        raise _invalid_address(f"{given!r} lacks a host or a port; write HOST:PORT")
    return given


def _invalid_address(message: str) -> CliError:
    return CliError(message, reason="INVALID_ADDRESS", status=2)


def rpc_error(error: grpc.aio.AioRpcError) -> CliError:
    """Return the error of a failed call, with reason and metadata of its ErrorInfo (see agent/daemon/rpc/status.py)."""
    code, message = error.code().name, error.details() or ""
    reason, metadata = error_info(error)
    if reason:
        fields: dict[str, Any] = {"code": code, **metadata}
        return CliError(message, reason=reason, **fields)
    if code == "UNAVAILABLE":
        return daemon_unreachable(_address_or_option(), message.partition("\n")[0])
    return CliError(message or "the call failed", reason=code, code=code)


def _address_or_option() -> str:
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


def _tls_credentials(given: options.Options) -> grpc.ChannelCredentials:
    import grpc

    try:
        ca, cert, key = (Path(path).read_bytes() for path in (given.tls_ca, given.tls_cert, given.tls_key))
    except OSError as error:
        raise CliError(f"cannot read {error.filename}: {error.strerror}", reason="INVALID_TLS", status=2) from None
    return grpc.ssl_channel_credentials(ca, key, cert)


def _tcp_channel(target: str) -> grpc.aio.Channel:
    import grpc

    given = options.current()
    files = (given.tls_ca, given.tls_cert, given.tls_key)
    if all(files):
        return grpc.aio.secure_channel(target, _tls_credentials(given), options=(*OPTIONS, *KEEPALIVE))
    if any(files) or not (given.insecure and _is_loopback(target)):
        raise CliError(
            f"TCP to {target} needs --tls-ca, --tls-cert and --tls-key; --insecure replaces them on loopback only",
            reason="TLS_NEEDED",
            status=2,
        )
    return grpc.aio.insecure_channel(target, options=(*OPTIONS, *KEEPALIVE))


def _check_socket(target: str) -> None:
    """Connect once to the unix socket of "unix:PATH", for an error message shorter than gRPC's own.

    :raises CliError: no process listens on it.
    """
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(target.removeprefix("unix:"))
        except OSError as error:
            raise daemon_unreachable(target, error.strerror or str(error)) from None


@asynccontextmanager
async def connected() -> AsyncIterator[Api]:
    """Yield the stubs of all services over one channel to the daemon.

    :raises CliError: no daemon listens on the unix socket, or the options for TCP and TLS are invalid.
    :raises ConfigError: the settings are invalid.
    """
    target = address()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else gRPC logs failed connections to stderr by itself
    import grpc

    if target.startswith("unix:"):
        _check_socket(target)
        channel = grpc.aio.insecure_channel(target, options=OPTIONS)
    else:
        channel = _tcp_channel(target)
    async with channel:
        yield api_over(channel)
