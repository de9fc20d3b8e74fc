"""Start a program: find its file, and set its descriptors, user, directory and terminal.

Uses posix_spawn(3), which does not copy the address space of PID 1 and reports a failed exec as an error. It cannot
change the user or the directory, so PID 1, which is single-threaded, changes its own for the time of the call: the
child inherits them, and execve(2) copies the effective user id to the saved one, so that it cannot become root again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import stat
import struct
import termios

from guest.user import User
from guest.wire import CallError

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TTY_GROUP = 5
PIPE_BYTES = 64 << 10  # default capacity of a pipe; pipe(7)
_WIDE_PIPE_BYTES = 1 << 20
# Ignored by CPython, but programs expect the default actions.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ)


class Stdio:
    """PID 1's ends of a program's streams: non-blocking descriptors, -1 for a stream that does not exist."""

    __slots__ = ("channel", "child_fds", "stderr", "stdin", "stdout", "tty_path")

    def __init__(self) -> None:
        self.stdin = self.stdout = self.stderr = -1
        self.channel: socket.socket | None = None
        self.tty_path = ""
        self.child_fds: list[int] = []

    def close_child(self) -> None:
        """Close the program's ends. Idempotent."""
        while self.child_fds:
            os.close(self.child_fds.pop())

    def close(self) -> None:
        """Close all descriptors, for a program that was not started. Idempotent."""
        self.close_child()
        for fd in {self.stdin, self.stdout, self.stderr} - {-1}:
            os.close(fd)
        self.stdin = self.stdout = self.stderr = -1
        if self.channel is not None:
            self.channel.close()


def open_pipes(*, stdin: bool, channel: bool = False) -> Stdio:
    """Create pipes for the standard streams of a program.

    :param stdin: a pipe for input; false: input is /dev/null.
    :param channel: also a socket, which is descriptor 3 of the program.
    """
    stdio = Stdio()
    try:
        if stdin:
            child, stdio.stdin = os.pipe2(os.O_CLOEXEC)
        else:
            child = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        stdio.child_fds.append(child)
        for name in ("stdout", "stderr"):
            ours, child = os.pipe2(os.O_CLOEXEC)
            setattr(stdio, name, ours)
            stdio.child_fds.append(child)
            os.set_blocking(ours, False)
        if stdin:
            os.set_blocking(stdio.stdin, False)
        if channel:
            stdio.channel, theirs = socket.socketpair()
            stdio.child_fds.append(theirs.detach())
            stdio.channel.setblocking(False)
    except OSError:
        stdio.close()
        raise
    return stdio


def widen_pipe(fd: int) -> None:
    """Enlarge a pipe to 1 MiB, for fewer switches between its two sides. Errors are ignored: `fd` may be a terminal."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _WIDE_PIPE_BYTES)
    except OSError:
        pass


def open_terminal(rows: int, cols: int, owner: User) -> Stdio:
    """Create a pseudo-terminal that belongs to `owner`; one descriptor is both stdin and stdout."""
    stdio = Stdio()
    master, slave = os.openpty()
    stdio.stdin = stdio.stdout = master
    stdio.child_fds.append(slave)
    try:
        stdio.tty_path = os.ttyname(slave)
        os.fchown(slave, owner.uid, _TTY_GROUP)
        os.fchmod(slave, 0o620)
        os.set_blocking(master, False)
        resize_terminal(master, rows, cols)
    except OSError:
        stdio.close()
        raise
    return stdio


def resize_terminal(master: int, rows: int, cols: int) -> None:
    """Set the window size (TIOCSWINSZ of ioctl_tty(2)); the kernel sends SIGWINCH to the foreground group."""
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))


def start(argv: list[str], env: dict[str, str], cwd: str, user: User, stdio: Stdio) -> int:
    """Start `argv` as the leader of a new session and process group; return its PID.

    :raises CallError: EXEC_NOT_FOUND (a shell's 127), EXEC_NOT_EXECUTABLE (126), CWD_INVALID, or the kernel's errno.
    """
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]]
    if stdio.tty_path:
        # Opened after setsid, so that it becomes the controlling terminal.
        actions = [(os.POSIX_SPAWN_OPEN, 0, stdio.tty_path, os.O_RDWR, 0)]
        actions += [(os.POSIX_SPAWN_DUP2, 0, 1), (os.POSIX_SPAWN_DUP2, 0, 2)]
    else:
        actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(stdio.child_fds)]
    _become(user)
    try:
        try:
            os.chdir(cwd)
        except OSError as error:
            raise CallError(
                "STATE", f"cannot enter the working directory {cwd}: {error.strerror}", "CWD_INVALID"
            ) from None
        search = env.get("PATH", DEFAULT_PATH)
        path = argv[0] if "/" in argv[0] else find_program(argv[0], search)
        try:
            return os.posix_spawn(
                path, argv, env, file_actions=actions, setsid=True, setsigdef=_DEFAULT_SIGNALS, setsigmask=()
            )
        except OSError as error:
            find_program(argv[0], search)  # raises a more precise error if the file itself cannot be executed
            raise _exec_error(path, error) from None
    finally:
        _become_root(user)
        os.chdir("/")


def _become(user: User) -> None:
    os.setgroups(user.groups)
    os.setresgid(user.gid, user.gid, 0)
    os.setresuid(user.uid, user.uid, 0)


def _become_root(user: User) -> None:
    os.setresuid(0, 0, 0)
    os.setresgid(0, 0, 0)
    if user.groups:
        os.setgroups([])


def find_program(name: str, path: str) -> str:
    """Return the file that execvp(3) would execute, with the rights of the effective user.

    :raises CallError: EXEC_NOT_FOUND or EXEC_NOT_EXECUTABLE.
    """
    candidates = [name] if "/" in name else [os.path.join(entry or ".", name) for entry in path.split(":")]
    found = ""
    for candidate in candidates:
        try:
            mode = os.stat(candidate).st_mode
        except OSError:
            continue
        if stat.S_ISREG(mode) and os.access(candidate, os.X_OK, effective_ids=True):
            return candidate
        found = found or candidate
    if found:
        raise CallError(
            "STATE", f"{found}: is not an executable file (as in a shell's status 126)", "EXEC_NOT_EXECUTABLE"
        )
    where = "no such file" if "/" in name else f"not found in PATH {path}"
    raise CallError("STATE", f"{name}: {where} (as in a shell's status 127)", "EXEC_NOT_FOUND")


def _exec_error(path: str, error: OSError) -> CallError:
    if error.errno == errno.ENOENT:
        return CallError("STATE", f"{path}: the interpreter in its first line does not exist", "EXEC_NOT_FOUND")
    if error.errno in (errno.EACCES, errno.ENOEXEC, errno.ETXTBSY, errno.EISDIR):
        return CallError("STATE", f"{path}: cannot be executed: {error.strerror}", "EXEC_NOT_EXECUTABLE")
    if error.errno == errno.E2BIG:
        return CallError("INVALID", f"{path}: arguments and environment are too long for the kernel", "E2BIG")
    return CallError(
        "EXHAUSTED", f"{path}: cannot be started: {error.strerror}", errno.errorcode.get(error.errno or 0, "")
    )
