"""The user's terminal: raw while a remote one is shown on it, and as it was afterwards, however that ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def size() -> tuple[int, int]:
    """Returns (rows, columns) of the terminal that is on stdin, stdout or stderr; (0, 0) where there is none."""
    for stream in (0, 1, 2):
        with contextlib.suppress(OSError):
            found = os.get_terminal_size(stream)
            return found.lines, found.columns
    return 0, 0


def name() -> str:
    """Returns TERM, or "" for the remote side's default."""
    return os.environ.get("TERM", "")[:64]


def is_terminal() -> bool:
    """Whether stdin is a terminal."""
    try:
        return os.isatty(sys.stdin.fileno())
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def raw(on_resize: Callable[[], None], *, keys: bool) -> Iterator[None]:
    """Inside the context, `on_resize` is called when the terminal's size changes, and with `keys` stdin passes every
    key on, Ctrl-C included, if it is a terminal.

    SIGCONT makes the terminal raw again: a shell that takes a
    stopped job back has changed it.
    """
    loop = asyncio.get_running_loop()
    fd = sys.stdin.fileno() if keys and is_terminal() else -1
    before = termios.tcgetattr(fd) if fd >= 0 else None

    def enter() -> None:
        if before is not None:
            tty.setraw(fd, termios.TCSADRAIN)

    def resume() -> None:
        enter()
        on_resize()

    try:
        enter()
        loop.add_signal_handler(signal.SIGWINCH, on_resize)
        loop.add_signal_handler(signal.SIGCONT, resume)
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)
        loop.remove_signal_handler(signal.SIGCONT)
        if before is not None:
            with contextlib.suppress(termios.error):  # it has hung up
                termios.tcsetattr(fd, termios.TCSADRAIN, before)
