"""SSH server for sandboxes. The user name is the credential.

Supported are shells with a terminal, commands, sftp and scp (by the guest's own programs, like sshd), and forwarding of
connections to the guest's ports.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncssh
import grpc

from agent.common.api_client import Api
from agent.common.config.addresses import split_address
from agent.common.config.gateway import GatewaySettings
from agent.common.errors import ConfigError
from agent.gateway.ingress.relay import relay
from agent.gateway.ingress.ssh_session import SshSession
from agent.gateway.nodes.guest_stream import GuestStream
from agent.gateway.sandboxes.exposures import Exposure, Exposures

_HOST_KEY = "ssh_host_key"
_LOGIN_S = 20


def _host_key(directory: Path) -> asyncssh.SSHKey:
    """Return the server's key, which the first start generates.

    :raises ConfigError: the file cannot be read or written, or holds no key.
    """
    path = directory / _HOST_KEY
    try:
        if not path.exists():
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(asyncssh.generate_private_key("ssh-ed25519").export_private_key())
        return asyncssh.read_private_key(path)
    except (OSError, asyncssh.KeyImportError) as error:
        raise ConfigError(f"cannot use the SSH host key {path}: {error}") from error


class SshServer:
    """The SSH server. `port` is its TCP port, 0 before `start` and if it is off.

    :param api_of: returns the API of a node by its address.
    """

    def __init__(self, settings: GatewaySettings, exposures: Exposures, api_of: Callable[[str], Api | None]) -> None:
        self._settings = settings
        self._exposures = exposures
        self._api_of = api_of
        self._acceptor: asyncssh.SSHAcceptor | None = None
        self._clients: dict[_SshConnection, str] = {}  # connection -> sandbox id
        self.port = 0

    async def start(self) -> None:
        """Start to serve, unless the address is empty.

        :raises ConfigError: the host key cannot be used.
        :raises OSError: the address cannot be bound.
        """
        host, port = split_address(self._settings.ssh_address, "gateway.ssh_address")
        if not host:
            return
        self._acceptor = await asyncssh.listen(
            host, port, server_host_keys=[_host_key(self._settings.state_dir)],
            server_factory=lambda: _SshConnection(self), login_timeout=_LOGIN_S, agent_forwarding=False,
            server_version="sandboxd",
        )  # fmt: skip
        self.port = self._acceptor.get_port()

    async def aclose(self) -> None:
        """Stop the server and close its connections."""
        if self._acceptor is not None:
            self._acceptor.close()
            for client in list(self._clients):
                client.close()
            await self._acceptor.wait_closed()

    def close_sandbox(self, sandbox_id: str) -> None:
        """Close the connections to a sandbox. Idempotent."""
        for client, owner in list(self._clients.items()):
            if owner == sandbox_id:
                client.close()

    def log_in(self, username: str, client: _SshConnection) -> tuple[Exposure, Api] | None:
        """Return the exposure of a user name and the API of its node, or None for an unknown name."""
        exposure = self._exposures.find(username, "ssh")
        api = None if exposure is None else self._api_of(exposure.node)
        if exposure is None or api is None:
            return None
        self._clients[client] = exposure.sandbox_id
        return exposure, api

    def log_out(self, client: _SshConnection) -> None:
        """Remove a connection that has ended."""
        self._clients.pop(client, None)


class _SshConnection(asyncssh.SSHServer):
    """One SSH connection of a client."""

    def __init__(self, server: SshServer) -> None:
        self._server = server
        self._connection: asyncssh.SSHServerConnection | None = None
        self.sandbox: tuple[Exposure, Api] | None = None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  of the base class
        self._server.log_out(self)

    def begin_auth(self, username: str) -> bool:
        """Accept a known user name without further authentication; an unknown one cannot authenticate."""
        self.sandbox = self._server.log_in(username, self)
        return self.sandbox is None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def session_requested(self) -> Any:
        """Open a session for a shell, a command or sftp."""
        if self.sandbox is None or self._connection is None:
            return False
        exposure, api = self.sandbox
        return self._connection.create_server_channel(encoding=None), SshSession(exposure.sandbox_id, api)

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int,  # noqa: ARG002  of the base class
    ) -> Any:  # fmt: skip
        """Forward a connection to a port of the guest; other destinations are prohibited."""
        if self.sandbox is None or dest_host not in ("localhost", "127.0.0.1", "::1"):
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, "only the sandbox's own ports")
        host = "127.0.0.1" if dest_host == "localhost" else dest_host
        exposure, api = self.sandbox

        async def forward(reader: Any, writer: Any) -> None:
            try:
                stream = await GuestStream.dial(api, exposure.sandbox_id, host, dest_port)
            except grpc.aio.AioRpcError:
                writer.close()
                return
            with contextlib.suppress(OSError, asyncssh.Error):
                await relay(reader, writer, stream)
                writer.close()

        return forward
