"""Prewarm a clone: run a program on a second CPU in its first moments, so that the first exec is fast.

An emulated CPU has to translate all code again in every clone, which takes most of a create's time. A child of PID 1,
which sleeps in the template, starts a program just as the first process of a sandbox is started, while PID 1 configures
the guest: the code is translated by the time of the first exec. In a guest with one CPU this would only cost time.
"""

from __future__ import annotations

import os
import signal

from guest import spawn
from guest.user import lookup_user

_PROGRAM = "/bin/true"


class Prewarmer:
    """Handle of PID 1 on the sleeping child."""

    def __init__(self) -> None:
        self._wake_fd = -1

    def fork(self, user: str) -> None:
        """Fork the child, which sleeps until `start` and then runs a program as `user`.

        :raises OSError: the process limit or the memory is exhausted.
        """
        sleep_fd, self._wake_fd = os.pipe()
        if os.fork():
            os.close(sleep_fd)
            return
        try:
            _detach_from_parent(sleep_fd)
            os.read(sleep_fd, 1)  # returns when PID 1 closes its end
            _run_program(user)
        finally:
            os._exit(0)  # errors are ignored: the sandbox's first process will report them

    def start(self) -> None:
        """Wake the child if there is one. Idempotent."""
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1


def _detach_from_parent(kept: int) -> None:
    """Close the descriptors shared with PID 1, so that PID 1 can really close the link, and reset signal handling."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))


def _run_program(name: str) -> None:
    """Run a program as `Registry.start` does, in the template's read-only root."""
    user = lookup_user(name)
    stdio = spawn.open_pipes(stdin=False)
    pid = spawn.start([_PROGRAM], {}, "/", user, stdio)
    stdio.close_child()
    os.waitpid(pid, 0)
