"""Log of the egress process: lines on stderr, which the agent or systemd stores. Never log text from a guest."""

from __future__ import annotations

import sys
import traceback

from agent.common.background import describe
from agent.common.errors import AgentError


def write_line(text: str) -> None:
    """Write one line."""
    print(f"egress: {text}", file=sys.stderr, flush=True)  # noqa: T201


def log_accept_failure(error: OSError) -> None:
    """Log that accept(2) fails, so that connections wait."""
    write_line(f"cannot accept connections: {error}")


class LoopLog:
    """Log failures of background loops; see `agent.common.background.Observer`. There are no metrics here."""

    def on_failure(self, loop: str, error: BaseException, retry_in_s: float | None) -> None:
        """Log a failure, with a traceback unless it is an `AgentError`."""
        write_line(f"background loop {loop} failed (next start in {retry_in_s} s): {describe(error)}")
        if not isinstance(error, AgentError):
            traceback.print_exception(error)

    def on_state(self, loop: str, *, failing: bool) -> None:
        """Do nothing: `on_failure` has logged it."""
