"""Errors as the command line prints them: one line on stderr, or one JSON object with --json."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from agent.cli import options
from agent.cli.text import printable_lines
from agent.common.api_client import error_info
from agent.common.errors import AgentError

if TYPE_CHECKING:
    import grpc

    from sandboxd.v1.process_pb2 import Exit

INTERRUPTED = 130  # 128 + SIGINT, as shells say it
START_IT = "start it with `sandboxd`, or give --address"


class CliError(AgentError):
    """The command cannot go on; the process ends with `status`."""

    default_reason = "COMMAND_FAILED"

    def __init__(self, message: str, *, reason: str | None = None, status: int = 1, **metadata: str) -> None:
        super().__init__(message, reason=reason, **metadata)
        self.status = status


def unreachable(address: str, why: str) -> CliError:
    """Returns the error for a daemon that is not there."""
    return CliError(f"no sandboxd answers at {address} ({why}): {START_IT}", reason="DAEMON_UNREACHABLE")


def from_rpc(error: grpc.aio.AioRpcError, address: str) -> CliError:
    """Returns the error of a failed call, with the reason of its ErrorInfo (see agent/daemon/rpc/status.py)."""
    code, message = error.code().name, error.details() or ""
    reason, metadata = error_info(error)
    if reason:
        fields: dict[str, Any] = {"code": code, **metadata}
        return CliError(message, reason=reason, **fields)
    if code == "UNAVAILABLE":
        return unreachable(address, message.partition("\n")[0])
    return CliError(message or "the call failed", reason=code, code=code)


def warn(message: str) -> None:
    """Prints a line on stderr that is no failure of the command; with --json as an object."""
    if options.current().json:
        sys.stderr.write(json.dumps({"warning": message}) + "\n")
    else:
        sys.stderr.write(f"sandboxctl: {printable_lines(message)}\n")
    sys.stderr.flush()


def complain(error: AgentError) -> None:
    """Prints an error on stderr: `sandboxctl: MESSAGE (REASON)`, or {"error": {...}} with --json."""
    if options.current().json:
        body: dict[str, Any] = {"message": error.message, "reason": error.reason, "metadata": error.metadata}
        sys.stderr.write(json.dumps({"error": body}) + "\n")
    else:
        sys.stderr.write(f"sandboxctl: {printable_lines(error.message)} ({error.reason})\n")
    sys.stderr.flush()


def status_of(error: AgentError) -> int:
    """Returns the exit status for an error: 2 for wrong settings as `sandboxd` has it, else 1 or the error's own."""
    from agent.common.errors import ConfigError

    if isinstance(error, ConfigError):
        return 2
    return error.status if isinstance(error, CliError) else 1


def exit_status(ended: Exit) -> int:
    """Returns the exit status for how a process ended, as a shell has it; says so if memory was lacking."""
    if ended.oom_killed:
        warn("the process was killed: the sandbox has no memory left; create it with a larger --memory")
    return 128 + ended.signal_number if ended.signal_number else ended.exit_code
