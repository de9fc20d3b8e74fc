"""Log of the egress process: lines on stderr, which the agent or systemd keeps. Never text that a guest sent."""

from __future__ import annotations

import sys
import traceback

from agent.common.background import describe
from agent.common.errors import AgentError


def write_line(text: str) -> None:
    """Write a line."""
    print(f"egress: {text}", file=sys.stderr, flush=True)  # noqa: T201


def log_accept_failure(error: OSError) -> None:
    """Write that connections wait because accept(2) fails."""
    write_line(f"cannot accept connections: {error}")


class LoopLog:
    """Log of background loops; see `agent.common.background.Observer`. The egress process serves no metrics."""

    def on_failure(self, loop: str, error: BaseException, retry_in_s: float | None) -> None:
        """Write the failure, with the traceback of an unexpected one."""
        write_line(f"background loop {loop} failed (next start in {retry_in_s} s): {describe(error)}")
        if not isinstance(error, AgentError):
            traceback.print_exception(error)

    def on_state(self, loop: str, *, failing: bool) -> None:
        """Keep no state: `on_failure` has written it."""
