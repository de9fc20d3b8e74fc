"""Progress for people: one line per step on standard error, with the seconds since the start."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_started = time.monotonic()


def say(text: str) -> None:
    """Prints one line, stamped with the seconds since this process began."""
    print(f"[{time.monotonic() - _started:6.1f} s] {text}", file=sys.stderr, flush=True)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Announces a step, and how long it took once it succeeds."""
    say(name)
    before = time.monotonic()
    yield
    say(f"{name}: done in {time.monotonic() - before:.1f} s")
