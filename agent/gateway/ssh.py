"""SSH into sandboxes: the user name is the credential. Shells with a real terminal, commands, sftp and scp (by the
guest's own programs, as sshd does it), and forwarded connections to the guest's ports.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncssh
import grpc

from agent.client import Api, opened
from agent.config import ConfigError, split_address
from agent.gateway.attachment import USER
from agent.gateway.exposures import Exposure, Exposures
from agent.gateway.guesttcp import GuestStream
from agent.gateway.ingress import splice
from agent.gateway_settings import GatewaySettings
from agent.telemetry import log
from agent.waiting import quietly
from sandboxd.v1 import process_pb2 as pb

_HOST_KEY = "ssh_host_key"
_SFTP = "/usr/lib/openssh/sftp-server"
_SHELL = "/bin/bash"
_READ_BYTES = 64 << 10
_LOGIN_S = 20
_MAX_ENV = 64


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
            process_factory=_run, encoding=None, login_timeout=_LOGIN_S, allow_scp=False, agent_forwarding=False,
            server_version="sandboxd", line_editor=False,
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
        conn.set_extra_info(sandboxd_client=self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  the base class has it
        self._server.log_out(self)

    def begin_auth(self, username: str) -> bool:
        """Nothing more is asked of whoever knows the name; for unknown ones there is no way in."""
        self.sandbox = self._server.log_in(username, self)
        return self.sandbox is None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

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


async def _run(process: asyncssh.SSHServerProcess[bytes]) -> None:
    """Runs what a client asks for in its sandbox."""
    client: _Client = process.get_extra_info("sandboxd_client")
    assert client.sandbox is not None
    exposure, api = client.sandbox
    call = opened(api.processes.Exec)
    feeder = None
    try:
        start = pb.ExecRequest.Start(sandbox_id=exposure.sandbox_id, spec=_spec(process))
        await call.write(pb.ExecRequest(start=start))
        feeder = asyncio.create_task(_feed(process, call))
        await _follow(process, call)
    except grpc.aio.AioRpcError as error:
        process.stderr.write(f"{error.details()}\r\n".encode())
        process.exit(127)
    except (BrokenPipeError, ConnectionError):
        process.close()
    except Exception:
        log.exception("ssh session failed")
        process.exit(255)
        raise
    finally:
        call.cancel()
        if feeder is not None:
            feeder.cancel()
            await quietly(feeder)


def _spec(process: asyncssh.SSHServerProcess[bytes]) -> pb.ProcessSpec:
    if process.subsystem == "sftp":
        argv = [_SFTP]
    elif process.subsystem:
        argv = ["/bin/false"]
    elif process.command is not None:
        argv = [_SHELL, "-c", process.command]
    else:
        argv = [_SHELL, "-l"]
    env = {name: value for name, value in list(process.env.items())[:_MAX_ENV] if name == "LANG" or name[:3] == "LC_"}
    spec = pb.ProcessSpec(argv=argv, user=USER, env=env, stdin=pb.ProcessSpec.STDIN_PIPE)
    if process.term_type is not None:
        cols, rows = process.term_size[:2]
        spec.terminal.CopyFrom(pb.Terminal(rows=max(rows, 1), cols=max(cols, 1), term=process.term_type[:64]))
    return spec


async def _follow(process: asyncssh.SSHServerProcess[bytes], call: Any) -> None:
    async for response in call:
        kind = response.WhichOneof("message")
        if kind == "stdout":
            process.stdout.write(response.stdout)
            await process.stdout.drain()
        elif kind == "stderr":
            process.stderr.write(response.stderr)
            await process.stderr.drain()
        elif kind == "exit":
            ended = response.exit
            if ended.signal_number:
                process.exit_with_signal(ended.signal.removeprefix("SIG"), core_dumped=False)
            else:
                process.exit(ended.exit_code)
            return


async def _feed(process: asyncssh.SSHServerProcess[bytes], call: Any) -> None:
    # Whatever ends the call is told by the side that reads it.
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, ConnectionError):
        while True:
            try:
                data = await process.stdin.read(_READ_BYTES)
            except asyncssh.TerminalSizeChanged as change:
                size = pb.Terminal(rows=max(change.height, 1), cols=max(change.width, 1))
                await call.write(pb.ExecRequest(resize=size))
                continue
            except asyncssh.SignalReceived as received:
                await call.write(pb.ExecRequest(signal=received.signal[:32]))
                continue
            except asyncssh.BreakReceived:
                continue
            if not data:
                await call.write(pb.ExecRequest(stdin_eof=True))
                return
            await call.write(pb.ExecRequest(stdin=data))
