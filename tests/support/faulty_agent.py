"""An agent that ends by SIGKILL at the beginning of a named step:
`python -m tests.support.faulty_agent STEP NUMBER FILE`.

Steps are those of `agent.common.telemetry.step`, so that all that a create or a delete is made of can be named. With
STEP "-" none ends it. The names of all steps are written to FILE as they begin.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from opentelemetry import trace

from agent.common import telemetry
from agent.daemon.__main__ import main


class _Tracer:
    """In place of OpenTelemetry's: each step of the agent starts a span."""

    def __init__(self, fatal: str, number: int, path: str) -> None:
        self._fatal = fatal
        self._left = number
        self._path = path

    @staticmethod
    def start_span(name: str, **_: Any) -> trace.Span:
        """A step that the guest has taken already."""
        return trace.INVALID_SPAN

    @contextlib.contextmanager
    def start_as_current_span(self, name: str, **_: Any) -> Iterator[None]:
        with open(self._path, "a") as file:
            file.write(f"{name}\n")
        if name == self._fatal:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        yield


if __name__ == "__main__":
    step, count, path = sys.argv[1:]
    del sys.argv[1:]
    telemetry.tracer = _Tracer(step, int(count), path)  # type: ignore[assignment]
    main()
