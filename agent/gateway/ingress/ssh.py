"""SSH into sandboxes: the user name is the credential. Shells with a real terminal, commands, sftp and scp (by the
guest's own programs, as sshd does it), and forwarded connections to the guest's ports.
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
from agent.common.config.gateway import GatewaySettings
from agent.common.config.settings import ConfigError, split_address
from agent.gateway.ingress.exposures import Exposure, Exposures
from agent.gateway.ingress.ingress import splice
from agent.gateway.ingress.ssh_session import Session
from agent.gateway.nodes.guest_tcp import GuestStream

_HOST_KEY = "ssh_host_key"
_LOGIN_S = 20


def _host_key(directory: Path) -> asyncssh.SSHKey:
    """Returns the server's key, made at the first start. :raises ConfigError:"""
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
    """The server. :param api_of: the API of a node, by its address."""

    def __init__(self, settings: GatewaySettings, exposures: Exposures, api_of: Callable[[str], Api | None]) -> None:
        self._settings = settings
        self._exposures = exposures
        self._api_of = api_of
        self._acceptor: asyncssh.SSHAcceptor | None = None
        self._clients: dict[_Client, str] = {}
        self.port = 0

    async def start(self) -> None:
        """Begins to serve, if an address is set. :raises ConfigError: :raises OSError:"""
        host, port = split_address(self._settings.ssh_address, "gateway.ssh_address")
        if not host:
            return
        self._acceptor = await asyncssh.listen(
            host, port, server_host_keys=[_host_key(self._settings.state_dir)], server_factory=lambda: _Client(self),
            login_timeout=_LOGIN_S, agent_forwarding=False, server_version="sandboxd",
        )  # fmt: skip
        self.port = self._acceptor.get_port()

    async def aclose(self) -> None:
        """Ends the server and its connections."""
        if self._acceptor is not None:
            self._acceptor.close()
            for client in list(self._clients):
                client.close()
            await self._acceptor.wait_closed()

    def end(self, sandbox_id: str) -> None:
        """Ends the connections to a sandbox that is gone."""
        for client, owner in list(self._clients.items()):
            if owner == sandbox_id:
                client.close()

    def log_in(self, username: str, client: _Client) -> tuple[Exposure, Api] | None:
        """Returns the sandbox of a user name, and the API of its node."""
        exposure = self._exposures.find(username, "ssh")
        api = None if exposure is None else self._api_of(exposure.node)
        if exposure is None or api is None:
            return None
        self._clients[client] = exposure.sandbox_id
        return exposure, api

    def log_out(self, client: _Client) -> None:
        """Forgets a connection that has ended."""
        self._clients.pop(client, None)


class _Client(asyncssh.SSHServer):
    """One connection."""

    def __init__(self, server: SshServer) -> None:
        self._server = server
        self._connection: asyncssh.SSHServerConnection | None = None
        self.sandbox: tuple[Exposure, Api] | None = None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  the base class has it
        self._server.log_out(self)

    def begin_auth(self, username: str) -> bool:
        """Nothing more is asked of whoever knows the name; for unknown ones there is no way in."""
        self.sandbox = self._server.log_in(username, self)
        return self.sandbox is None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def session_requested(self) -> Any:
        """A shell, a command, or sftp."""
        if self.sandbox is None or self._connection is None:
            return False
        exposure, api = self.sandbox
        return self._connection.create_server_channel(encoding=None), Session(exposure.sandbox_id, api)

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int,  # noqa: ARG002  the base class has them
    ) -> Any:  # fmt: skip
        """A forwarded connection, to ports of the guest alone."""
        if self.sandbox is None or dest_host not in ("localhost", "127.0.0.1", "::1"):
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, "only the sandbox's own ports")
        host = "127.0.0.1" if dest_host == "localhost" else dest_host
        exposure, api = self.sandbox

        async def carry(reader: Any, writer: Any) -> None:
            try:
                stream = await GuestStream.dial(api, exposure.sandbox_id, host, dest_port)
            except grpc.aio.AioRpcError:
                writer.close()
                return
            with contextlib.suppress(OSError, asyncssh.Error):
                await splice(reader, writer, stream)
                writer.close()

        return carry
