"""Print progress to standard error: a line per step, with the seconds since the start."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_started = time.monotonic()


def say(text: str) -> None:
    """Print a line with the seconds since the start of this process."""
    print(f"[{time.monotonic() - _started:6.1f} s] {text}", file=sys.stderr, flush=True)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print the name of a step, and its duration once it has succeeded."""
    say(name)
    before = time.monotonic()
    yield
    say(f"{name}: done in {time.monotonic() - before:.1f} s")
