"""Processes that the host started, and the one reaper of the guest.

PID 1 inherits every orphan, so `Registry.reap` alone calls waitpid(2), for any child, and hands each status to its
owner; nothing else in the guest may wait for a child, or statuses are lost.
"""

from __future__ import annotations

import os
import signal
import time

from guest import reactor, spawn
from guest.oom import OomWatcher
from guest.output import OutputLog, read_chunk
from guest.reactor import Waiters
from guest.spawn import Stdio
from guest.user import User
from guest.wire import CallError, Frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

MAX_EXITED = 1024  # exited processes that are remembered for a later wait or attach


class Process:
    """One process: its streams, its output, and in the end its exit."""

    def __init__(self, number: int, pid: int, argv: list[str], user: User, cwd: str, stdio: Stdio, replay: int) -> None:
        self.number = number
        self.pid = pid
        self.argv = argv
        self.user = user
        self.cwd = cwd
        self.start_ns = time.time_ns()
        self.tty = bool(stdio.tty_path)
        self.exit: dict[str, object] | None = None
        self.exited = Waiters()
        self.log = OutputLog(replay)
        self._stdin = stdio.stdin
        self._stdin_wide = False
        self._master = stdio.stdout if self.tty else -1
        self._channel = stdio.channel
        outputs = {stdio.stdout: Frame.STDOUT, stdio.stderr: Frame.STDERR}
        outputs.pop(-1, None)
        self._undrained = set(outputs)  # may still hold bytes that were written before the exit
        for fd in {*outputs, self._stdin} - {-1}:
            reactor.register(fd)
        for fd, kind in outputs.items():
            reactor.spawn(self._pump(int(kind), fd))

    def describe(self) -> dict[str, object]:
        """Returns the process as JSON."""
        return {
            "id": self.number, "pid": self.pid, "argv": self.argv, "user": self.user.name, "cwd": self.cwd,
            "start_ns": self.start_ns, "tty": self.tty, "exit": self.exit,
        }  # fmt: skip

    async def _pump(self, kind: int, fd: int) -> None:
        """Moves output into the log until its last writer has closed it."""
        wide = False
        while True:
            await self.log.room()
            try:
                buffer, size = read_chunk(fd)
            except BlockingIOError:
                if self.exit is not None:
                    self._drained(fd)
                await reactor.readable(fd)
                continue
            except OSError:  # EIO: the last process has closed the terminal
                break
            if not size:
                break
            self.log.append(kind, buffer, size)
            if size == spawn.PIPE_BYTES and not wide:
                wide = True
                spawn.widen_pipe(fd)
        reactor.unregister(fd)
        if fd == self._master:
            self._master = self._stdin = -1
        os.close(fd)
        self._drained(fd)

    def _drained(self, fd: int) -> None:
        self._undrained.discard(fd)
        if self.exit is not None and not self._undrained:
            self.log.finish()

    def set_exit(self, status: int, *, oom: bool) -> None:
        """Takes the status that waitpid(2) gave."""
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        self.exit = {
            "code": None if number else os.WEXITSTATUS(status),
            "signal": number,
            "signal_name": signal_name(number) if number else "",
            "oom": oom,
        }
        for fd in self._undrained:
            reactor.poke(fd)  # one more look: the log is finished once each pump finds nothing after the exit
        if not self._undrained:
            self.log.finish()
        self.exited.wake()
        self.close_stdin()
        if self._channel is not None:  # nobody asked for it
            self._channel.close()
            self._channel = None

    def take_channel(self) -> socket.socket:
        """Returns our end of the program's channel, once. :raises CallError: it has none, or it was taken."""
        channel, self._channel = self._channel, None
        if channel is None:
            raise CallError(
                "STATE", f"process {self.number} has no channel, or another client has it, or it exited", "NO_CHANNEL"
            )
        return channel

    async def write_stdin(self, data: bytes) -> None:
        """Writes to standard input, waiting for the process to read; bytes for a closed input are dropped, as by a
        shell.
        """
        view = memoryview(data)
        while view and self._stdin >= 0:
            try:
                written = os.write(self._stdin, view)
                view = view[written:]
                if view and not self._stdin_wide:
                    self._stdin_wide = True
                    spawn.widen_pipe(self._stdin)
            except BlockingIOError:
                await reactor.writable(self._stdin)
            except OSError:  # EPIPE, EIO: nobody reads any more
                self.close_stdin()
                return

    async def end_stdin(self) -> None:
        """Ends standard input: closes the pipe, or types the end-of-file character on a terminal."""
        if self.tty:
            await self.write_stdin(b"\x04")
        else:
            self.close_stdin()

    def close_stdin(self) -> None:
        """Closes the pipe to standard input; a terminal stays. Idempotent."""
        if self._stdin >= 0 and not self.tty:
            reactor.unregister(self._stdin)
            os.close(self._stdin)
            self._stdin = -1

    def resize(self, rows: int, cols: int) -> None:
        """Changes the size of the terminal. :raises CallError: it has none, or it is closed."""
        if not self.tty:
            raise CallError("STATE", f"process {self.number} has no terminal; start it with one", "NO_TERMINAL")
        if self._master < 0:
            raise exited_error(self)
        spawn.resize_terminal(self._master, rows, cols)

    def kill(self, number: int) -> None:
        """Sends a signal to the process group. :raises CallError: the process has exited."""
        if self.exit is not None:
            raise exited_error(self)
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            raise exited_error(self) from None


def exited_error(process: Process) -> CallError:
    """Returns the error for what can only be done to a running process."""
    return CallError("STATE", f"process {process.number} has exited already", "PROCESS_EXITED")


def signal_name(number: int) -> str:
    """Returns "SIGTERM" for 15; real-time signals as "SIGRTMIN+n"."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


class Registry:
    """All processes that the host started in this guest, running and lately exited."""

    def __init__(self, oom: OomWatcher) -> None:
        self.by_number: dict[int, Process] = {}
        self._by_pid: dict[int, Process] = {}
        self._exited: dict[int, None] = {}  # numbers in order of exit
        self._next_number = 1
        self._oom = oom

    def get(self, number: object) -> Process:
        """Returns the process with this number. :raises CallError: there is none."""
        process = self.by_number.get(number) if isinstance(number, int) else None
        if process is None:
            raise CallError(
                "NOT_FOUND", f"no process {number!r} in this sandbox; list the processes to see which there are"
            )
        return process

    def start(self, argv: list[str], env: dict[str, str], cwd: str, user: User, stdio: Stdio, replay: int) -> Process:
        """Starts a process. :raises CallError: it cannot be started; its streams are closed."""
        try:
            pid = spawn.start(argv, env, cwd, user, stdio)
        except BaseException:
            stdio.close()
            raise
        stdio.close_child()
        process = Process(self._next_number, pid, argv, user, cwd, stdio, replay)
        self._next_number += 1
        self.by_number[process.number] = process
        self._by_pid[pid] = process
        return process

    def forget(self, process: Process) -> None:
        """Drops an exited process before its time: nobody can ask for it again."""
        self.by_number.pop(process.number, None)
        self._exited.pop(process.number, None)

    def start_again(self) -> None:
        """Gives the next process the first number, once all have been forgotten."""
        self._next_number = 1

    async def reap(self) -> None:
        """Collects the status of every child that ends, for ever."""
        child_ended = reactor.watch_signal(signal.SIGCHLD)
        while True:
            self._reap_now()
            await child_ended.wait()

    def _reap_now(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            process = self._by_pid.pop(pid, None)
            if process is not None:
                killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
                process.set_exit(status, oom=killed and self._oom.killed(pid))
                self._remember(process)

    def _remember(self, process: Process) -> None:
        if process.number in self.by_number:
            self._exited[process.number] = None
        while len(self._exited) > MAX_EXITED:
            oldest = next(iter(self._exited))
            del self._exited[oldest]
            del self.by_number[oldest]
