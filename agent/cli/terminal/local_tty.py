"""The user's terminal: its size and type, and raw mode that is undone however the command ends."""

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
    """Return (rows, columns) of the terminal on stdin, stdout or stderr, or (0, 0) without one."""
    for stream in (0, 1, 2):
        with contextlib.suppress(OSError):
            found = os.get_terminal_size(stream)
            return found.lines, found.columns
    return 0, 0


def term_type() -> str:
    """Return $TERM, or "" for the guest's default."""
    return os.environ.get("TERM", "")[:64]


def stdin_is_tty() -> bool:
    """Return whether stdin is a terminal."""
    try:
        return os.isatty(sys.stdin.fileno())
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def raw_mode(on_resize: Callable[[], None], *, raw_stdin: bool) -> Iterator[None]:
    """Call `on_resize` when the terminal's size changes; with `raw_stdin` put the terminal on stdin into raw mode.

    In raw mode every key reaches stdin, Ctrl-C included. SIGCONT enters raw mode again, since a shell resets the
    terminal when it continues a stopped job.
    """
    loop = asyncio.get_running_loop()
    fd = sys.stdin.fileno() if raw_stdin and stdin_is_tty() else -1
    before = termios.tcgetattr(fd) if fd >= 0 else None

    def enter() -> None:
        if before is not None:
            tty.setraw(fd, termios.TCSADRAIN)

    def on_continue() -> None:
        enter()
        on_resize()

    try:
        enter()
        loop.add_signal_handler(signal.SIGWINCH, on_resize)
        loop.add_signal_handler(signal.SIGCONT, on_continue)
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)
        loop.remove_signal_handler(signal.SIGCONT)
        if before is not None:
            with contextlib.suppress(termios.error):  # the terminal has hung up
                termios.tcsetattr(fd, termios.TCSADRAIN, before)
