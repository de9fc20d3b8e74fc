"""SSH session channel: a shell, a command or sftp, as a process of the sandbox."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import asyncssh
import grpc

from agent.common.aio import cancel_and_wait
from agent.common.api_client import Api, opened
from agent.common.model import DEFAULT_USER
from agent.common.telemetry import log
from sandboxd.v1 import process_pb2 as pb

# The guest's own server, like sshd, so that permissions and semantics are those of the guest.
_SFTP = "/usr/lib/openssh/sftp-server"
_SHELL = "/bin/bash"
_MAX_QUEUED = 16  # messages to the process; beyond it, the client's channel is paused
_MAX_ENV = 64


class SshSession(asyncssh.SSHServerSession[bytes]):
    """One session channel and its process."""

    def __init__(self, sandbox_id: str, api: Api) -> None:
        self._id = sandbox_id
        self._api = api
        self._chan: asyncssh.SSHServerChannel[bytes] | None = None
        self._terminal: pb.Terminal | None = None
        self._argv: list[str] = []
        self._input: asyncio.Queue[pb.ExecRequest] = asyncio.Queue()
        self._writable = asyncio.Event()
        self._writable.set()
        self._task: asyncio.Task[None] | None = None

    # -- requests of the client, called by asyncssh --------------------------------------------------------------------

    def connection_made(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        self._chan = chan

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  of the base class
        if self._task is not None:
            self._task.cancel()

    def pty_requested(self, term_type: str, term_size: Any, term_modes: Any) -> bool:  # noqa: ARG002
        self._terminal = pb.Terminal(cols=max(term_size[0], 1), rows=max(term_size[1], 1), term=term_type[:64])
        return True

    def shell_requested(self) -> bool:
        self._argv = [_SHELL, "-l"]
        return True

    def exec_requested(self, command: str) -> bool:
        self._argv = [_SHELL, "-c", command]
        return True

    def subsystem_requested(self, subsystem: str) -> bool:
        self._argv = [_SFTP]
        return subsystem == "sftp"

    def session_started(self) -> None:
        self._task = asyncio.create_task(self._run())

    def data_received(self, data: bytes, datatype: Any) -> None:  # noqa: ARG002
        self._enqueue(pb.ExecRequest(stdin=data))

    def eof_received(self) -> bool:
        self._enqueue(pb.ExecRequest(stdin_eof=True))
        return True  # keeps the server's direction open

    def terminal_size_changed(self, width: int, height: int, pixwidth: int, pixheight: int) -> None:  # noqa: ARG002
        self._enqueue(pb.ExecRequest(resize=pb.Terminal(cols=max(width, 1), rows=max(height, 1))))

    def signal_received(self, signal: str) -> None:
        self._enqueue(pb.ExecRequest(signal=signal[:32]))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _enqueue(self, request: pb.ExecRequest) -> None:
        self._input.put_nowait(request)
        if self._input.qsize() >= _MAX_QUEUED and self._chan is not None:
            self._chan.pause_reading()

    # -- the process ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        assert self._chan is not None
        call = opened(self._api.processes.Exec)
        input_task = None
        try:
            start = pb.ExecRequest.Start(sandbox_id=self._id, spec=self._spec(self._chan))
            await call.write(pb.ExecRequest(start=start))
            input_task = asyncio.create_task(self._relay_input(call, self._chan))
            await self._relay_output(call, self._chan)
        except grpc.aio.AioRpcError as error:
            self._chan.write_stderr(f"{error.details()}\r\n".encode())
            self._chan.exit(127)
        except OSError:
            self._chan.close()  # the client disconnected
        except Exception:  # noqa: BLE001  a bug must end this session alone
            log.exception("ssh session failed")
            self._chan.exit(255)
        finally:
            call.cancel()
            if input_task is not None:
                await cancel_and_wait(input_task)

    def _spec(self, chan: asyncssh.SSHServerChannel[bytes]) -> pb.ProcessSpec:
        requested = list(chan.get_environment().items())[:_MAX_ENV]
        env = {name: value for name, value in requested if name == "LANG" or name.startswith("LC_")}
        return pb.ProcessSpec(
            argv=self._argv, user=DEFAULT_USER, env=env, stdin=pb.ProcessSpec.STDIN_PIPE, terminal=self._terminal
        )

    async def _relay_output(self, call: Any, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        async for response in call:
            kind = response.WhichOneof("message")
            if kind == "exit":
                ended = response.exit
                if ended.signal_number:
                    chan.exit_with_signal(ended.signal.removeprefix("SIG"), core_dumped=False)
                else:
                    chan.exit(ended.exit_code)
                return
            await self._writable.wait()
            if kind == "stdout":
                chan.write(response.stdout)
            elif kind == "stderr":
                chan.write_stderr(response.stderr)

    async def _relay_input(self, call: Any, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        # `_relay_output` reports how the call ended.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, OSError):
            while True:
                await call.write(await self._input.get())
                if self._input.qsize() < _MAX_QUEUED:
                    chan.resume_reading()
