"""Errors and warnings on stderr (one line each, or one JSON object with --json), and the exit status for each end."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from agent.cli import options
from agent.cli.formatting import printable_lines
from agent.common.errors import AgentError, ConfigError

if TYPE_CHECKING:
    from sandboxd.v1.process_pb2 import Exit

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as in shells
START_DAEMON = "start it with `sandboxd`, or give --address"


class CliError(AgentError):
    """A failure of the command; the process exits with `status`."""

    default_reason = "COMMAND_FAILED"

    def __init__(self, message: str, *, reason: str | None = None, status: int = 1, **metadata: str) -> None:
        super().__init__(message, reason=reason, **metadata)
        self.status = status


def daemon_unreachable(address: str, why: str) -> CliError:
    """Return the error for an address at which no daemon answers."""
    return CliError(f"no sandboxd answers at {address} ({why}): {START_DAEMON}", reason="DAEMON_UNREACHABLE")


def print_warning(message: str) -> None:
    """Print a line on stderr that does not change the exit status: {"warning": ...} with --json."""
    _write_stderr({"warning": message}, message)


def print_error(error: AgentError) -> None:
    """Print an error on stderr: `sandboxctl: MESSAGE (REASON)`, or {"error": {...}} with --json."""
    body: dict[str, Any] = {"message": error.message, "reason": error.reason, "metadata": error.metadata}
    _write_stderr({"error": body}, f"{error.message} ({error.reason})")


def _write_stderr(value: dict[str, Any], line: str) -> None:
    text = json.dumps(value) if options.current().json else f"sandboxctl: {printable_lines(line)}"
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def error_exit_status(error: AgentError) -> int:
    """Return the exit status for an error: 2 for invalid settings, as `sandboxd` exits, else the error's own or 1."""
    if isinstance(error, ConfigError):
        return 2
    return error.status if isinstance(error, CliError) else 1


def process_exit_status(end: Exit) -> int:
    """Return the exit status that a shell would give a process, and warn if the guest's OOM killer ended it."""
    if end.oom_killed:
        print_warning("the process was killed: the sandbox has no memory left; create it with a larger --memory")
    return 128 + end.signal_number if end.signal_number else end.exit_code
