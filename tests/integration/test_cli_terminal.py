"""`sandboxctl exec -it` and `attach` on a real terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.ctl import TIMEOUT_S, Ctl

pytestmark = pytest.mark.vm


class Terminal:
    """Our side of a pseudo-terminal on which `sandboxctl` runs."""

    def __init__(self, ctl: Ctl, *words: str, rows: int = 24, cols: int = 80) -> None:
        self.master, self.slave = pty.openpty()
        self.set_size(rows, cols)
        self.before = termios.tcgetattr(self.slave)
        ends = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave}
        self.process = ctl.start(*words, start_new_session=True, **ends)
        self.seen = b""

    def set_size(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, cols, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def expect(self, pattern: bytes, timeout_s: float = TIMEOUT_S) -> re.Match[bytes]:
        """Returns the match, once it is on the screen, and forgets all up to it."""
        deadline = time.monotonic() + timeout_s
        while (match := re.search(pattern, self.seen)) is None:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, (pattern, self.seen)
            self.seen += os.read(self.master, 65536)
        self.seen = self.seen[match.end() :]
        return match

    def end(self) -> int:
        """Returns the exit status."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.05)[0]:
                self.seen += os.read(self.master, 65536)
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@contextmanager
def terminal(ctl: Ctl, *words: str, **size: int) -> Iterator[Terminal]:
    opened = Terminal(ctl, *words, **size)
    try:
        yield opened
    finally:
        opened.close()


def test_a_shell_on_a_terminal(ctl: Ctl, ctl_box: str) -> None:
    with terminal(ctl, "exec", "-it", "-e", "PS1=ready> ", ctl_box, "bash", "--norc", rows=33, cols=101) as screen:
        screen.expect(rb"ready> $")
        assert termios.tcgetattr(screen.slave) != screen.before
        screen.type(b"stty size; tty\r")
        screen.expect(rb"33 101\r\n/dev/pts/\d+\r\n")
        screen.set_size(44, 120)
        screen.process.send_signal(signal.SIGWINCH)
        # The shell learns of it by a call of its own, maybe after the next line, and draws its line again then.
        screen.type(b'until [ "$(stty size)" = "44 120" ]; do sleep 0.1; done; echo "now" is $(stty size)\r')
        screen.expect(rb"now is 44 120\r\n")
        # What the job itself prints says that it, and not the shell, has the terminal now.
        screen.type(b"sh -c 'echo sl\"\"eeps; exec sleep 100'\r")
        screen.expect(rb"sleeps\r\n")
        screen.type(b"\x03")
        screen.expect(rb"\^C")
        screen.expect(rb"ready> $")
        screen.type(b"echo li''ves\r")
        screen.expect(rb"lives\r\n")
        screen.type(b"exit 3\r")
        assert screen.end() == 3
        assert termios.tcgetattr(screen.slave) == screen.before


def test_a_terminal_is_restored_when_the_command_is_ended(ctl: Ctl, ctl_box: str) -> None:
    with terminal(ctl, "exec", "-it", ctl_box, "sh", "-c", "echo up; sleep 100") as screen:
        screen.expect(rb"up\r\n")
        assert termios.tcgetattr(screen.slave) != screen.before
        screen.process.terminate()
        assert screen.end() == 143
        assert termios.tcgetattr(screen.slave) == screen.before


def test_a_program_that_cannot_start_leaves_the_terminal_alone(ctl: Ctl, ctl_box: str) -> None:
    with terminal(ctl, "exec", "-it", ctl_box, "no-such-program") as screen:
        assert screen.end() == 127
        assert termios.tcgetattr(screen.slave) == screen.before


def test_attach_to_a_terminal_and_leave_it(ctl: Ctl, ctl_box: str) -> None:
    number = ctl("exec", "-dt", "-e", "PS1=ready> ", ctl_box, "bash", "--norc").decode().strip()
    with terminal(ctl, "attach", ctl_box, number, rows=50, cols=90) as screen:
        screen.expect(rb"ready> $")
        screen.type(b'until [ "$(stty size)" = "50 90" ]; do sleep 0.1; done; echo "now" is $(stty size)\r')
        screen.expect(rb"now is 50 90\r\n")
        screen.type(b"\x1d")
        assert screen.end() == 0
        assert termios.tcgetattr(screen.slave) == screen.before
    (process,) = [one for one in ctl.objects("ps", ctl_box) if one["process_id"] == int(number)]
    assert (process["terminal"], process["exit"]) == (True, None)
    ctl("kill", ctl_box, number, "--signal", "9")
    ctl("wait", ctl_box, number, status=137)


def test_logs_on_a_terminal_have_no_escapes(ctl: Ctl, ctl_box: str) -> None:
    ctl("exec", "-u", "root", ctl_box, "sh", "-c", r"printf '\033]0;title\007marker\n' >/dev/console")
    assert b"\x1b]0;title\x07marker" in ctl("logs", ctl_box)
    with terminal(ctl, "logs", ctl_box) as screen:
        assert screen.end() == 0
        assert b"]0;titlemarker\r\n" in screen.seen
        assert b"\x1b" not in screen.seen
