"""Shell scripts in the guest, for paths that are not UTF-8; see `agent.cli.transfer.guest_files`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from agent.cli.errors import CliError
from agent.common.aio import cancel_and_wait
from agent.common.api_client import Api, opened

_MAX_COLLECTED = 1 << 20
_MAX_STDERR = 4096
# Decodes each word in place. `$(...)` drops trailing newlines, so an x is appended and removed again.
_PRELUDE = """n=$#
while [ $n -gt 0 ]; do
    v=$(printf '%bx' "$1"); v=${v%x}
    shift; set -- "$@" "$v"; n=$((n - 1))
done
"""


def escaped(word: bytes) -> str:
    """Return bytes as octal escapes for %b of printf(1)."""
    return "".join(f"\\0{byte:03o}" for byte in word)


class GuestShell:
    """Runs scripts as root of one sandbox; their arguments ("$1", "$2") are exact bytes."""

    def __init__(self, api: Api, sandbox_id: str) -> None:
        self._processes = api.processes
        self._id = sandbox_id

    async def run(
        self, script: str, *words: bytes, stdin: AsyncIterator[bytes] | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Run a script with `stdin` (default: empty) and yield its output.

        :raises CliError: its exit status is not 0; the message is its stderr.
        """
        from sandboxd.v1 import process_pb2

        spec = process_pb2.ProcessSpec(
            argv=["sh", "-c", _PRELUDE + script, "sh", *(escaped(word) for word in words)], user="root", cwd="/",
            env={"LC_ALL": "C"},
            stdin=process_pb2.ProcessSpec.STDIN_NULL if stdin is None else process_pb2.ProcessSpec.STDIN_PIPE,
        )  # fmt: skip
        call = opened(self._processes.Exec)
        feeder: asyncio.Task[None] | None = None
        stderr = b""
        try:
            await call.write(
                process_pb2.ExecRequest(start=process_pb2.ExecRequest.Start(sandbox_id=self._id, spec=spec))
            )
            if stdin is not None:
                feeder = asyncio.create_task(_send_stdin(call, stdin))
            async for response in call:
                if response.stdout:
                    yield response.stdout
                stderr = (stderr + response.stderr)[:_MAX_STDERR]
                if response.HasField("exit") and (response.exit.signal_number or response.exit.exit_code):
                    raise CliError(stderr.decode(errors="replace").strip() or "failed", reason="GUEST_ERROR")
            if feeder is not None:
                await feeder
        finally:
            call.cancel()
            if feeder is not None:
                await cancel_and_wait(feeder)

    async def collect(self, script: str, *words: bytes, stdin: AsyncIterator[bytes] | None = None) -> bytes:
        """Run a script and return its whole output.

        :raises CliError: its exit status is not 0, or the output exceeds 1 MiB.
        """
        result = b""
        async with contextlib.aclosing(self.run(script, *words, stdin=stdin)) as pieces:
            async for data in pieces:
                result += data
                if len(result) > _MAX_COLLECTED:
                    raise CliError("the output of the sandbox is too long", reason="GUEST_MALFORMED")
        return result

    async def records(self, script: str, fields: int, *words: bytes) -> AsyncIterator[list[bytes]]:
        """Run a script and yield its output as records of `fields` fields, each of which ends with NUL.

        :raises CliError: its exit status is not 0, or a field exceeds 1 MiB.
        """
        rest = b""
        record: list[bytes] = []
        async with contextlib.aclosing(self.run(script, *words)) as pieces:
            async for data in pieces:
                *complete, rest = (rest + data).split(b"\0")
                if len(rest) > _MAX_COLLECTED:
                    raise CliError("the sandbox sent a file name that is too long", reason="GUEST_MALFORMED")
                for field in complete:
                    record.append(field)
                    if len(record) == fields:
                        yield record
                        record = []


async def _send_stdin(call: Any, stdin: AsyncIterator[bytes]) -> None:
    import grpc

    from sandboxd.v1 import process_pb2

    async for data in stdin:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # `run` raises the error of the call
            await call.write(process_pb2.ExecRequest(stdin=data))
            continue
        return
    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
        await call.write(process_pb2.ExecRequest(stdin_eof=True))
