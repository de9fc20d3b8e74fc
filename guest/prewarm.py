"""A program run ahead, on another CPU, in the first moments of a clone: by a child of PID 1, asleep in the template.

An emulated CPU translates all code anew in every clone, and that is nearly all of a create's time. While PID 1 answers
the host and makes the root, the child starts a program as a sandbox's first process is started, so that this code is
translated by the time the host asks for one. A guest with one CPU would only lose by it.
"""

from __future__ import annotations

import os
import signal

from guest import spawn
from guest.user import lookup_user

_PROGRAM = "/bin/true"


class Ahead:
    """The child, seen by PID 1."""

    def __init__(self) -> None:
        self._sleep = -1

    def fork(self, user: str) -> None:
        """Makes the child, which sleeps until `start`, and then runs a program as `user`. :raises OSError:"""
        sleep, self._sleep = os.pipe()
        if os.fork():
            os.close(sleep)
            return
        try:
            _leave_parent_alone(sleep)
            os.read(sleep, 1)  # returns when PID 1 closes its end
            _run_program(user)
        finally:
            os._exit(0)  # whatever went wrong: the sandbox's own process will meet the same, and say so

    def start(self) -> None:
        """Wakes the child, if there is one that sleeps. Idempotent."""
        if self._sleep >= 0:
            os.close(self._sleep)
            self._sleep = -1


def _leave_parent_alone(kept: int) -> None:
    """Closes what belongs to PID 1 (a link that it closes must be closed), and its ways to learn of signals."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))


def _run_program(name: str) -> None:
    """As `Registry.start` does; the root is still the template's."""
    user = lookup_user(name)
    stdio = spawn.open_pipes(stdin=False)
    pid = spawn.start([_PROGRAM], {}, "/", user, stdio)
    stdio.close_child()
    os.waitpid(pid, 0)
