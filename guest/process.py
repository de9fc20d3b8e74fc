"""Processes that the host has started, and the reaper of all children of PID 1.

PID 1 inherits all orphans. So only `ProcessRegistry.reap` calls waitpid(2), for any child, and passes each exit status
to its `Process`: another caller would take statuses away.
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

MAX_EXITED = 1024  # exited processes that are kept for a later wait or attach


class Process:
    """A process that the host has started: its streams, its output, and its exit."""

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
        self._undrained = set(outputs)  # descriptors that may still have bytes from before the exit
        for fd in {*outputs, self._stdin} - {-1}:
            reactor.register(fd)
        for fd, kind in outputs.items():
            reactor.spawn(self._pump(int(kind), fd))

    def describe(self) -> dict[str, object]:
        """Return the facts of the process as JSON."""
        return {
            "id": self.number, "pid": self.pid, "argv": self.argv, "user": self.user.name, "cwd": self.cwd,
            "start_ns": self.start_ns, "tty": self.tty, "exit": self.exit,
        }  # fmt: skip

    async def _pump(self, kind: int, fd: int) -> None:
        """Copy output from `fd` to the log until EOF."""
        wide = False
        while True:
            await self.log.wait_for_room()
            try:
                buffer, size = read_chunk(fd)
            except BlockingIOError:
                if self.exit is not None:
                    self._drained(fd)
                await reactor.readable(fd)
                continue
            except OSError:  # EIO: the last process with the terminal has closed it
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
        """Record the exit status from waitpid(2), and close standard input and the channel."""
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        self.exit = {
            "code": None if number else os.WEXITSTATUS(status),
            "signal": number,
            "signal_name": signal_name(number) if number else "",
            "oom": oom,
        }
        for fd in self._undrained:
            reactor.poke(fd)  # read once more: the log is finished once each pump has found nothing after the exit
        if not self._undrained:
            self.log.finish()
        self.exited.wake()
        self.close_stdin()
        if self._channel is not None:  # not taken by a client
            self._channel.close()
            self._channel = None

    def take_channel(self) -> socket.socket:
        """Hand over the guest's end of the channel (descriptor 3 of the process) to the caller.

        :raises CallError: the process has no channel, or it was taken already.
        """
        channel, self._channel = self._channel, None
        if channel is None:
            raise CallError(
                "STATE",
                f"process {self.number} has no channel, has exited, or another client uses the channel",
                "NO_CHANNEL",
            )
        return channel

    async def write_stdin(self, data: bytes) -> None:
        """Write to standard input, waiting while the pipe is full; drop the bytes if it is closed."""
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
            except OSError:  # EPIPE, EIO: all readers have closed it
                self.close_stdin()
                return

    async def end_stdin(self) -> None:
        """End standard input: close the pipe, or send the end-of-file character to the terminal."""
        if self.tty:
            await self.write_stdin(b"\x04")
        else:
            self.close_stdin()

    def close_stdin(self) -> None:
        """Close the pipe to standard input; does nothing for a terminal. Idempotent."""
        if self._stdin >= 0 and not self.tty:
            reactor.unregister(self._stdin)
            os.close(self._stdin)
            self._stdin = -1

    def resize(self, rows: int, cols: int) -> None:
        """Set the size of the terminal.

        :raises CallError: the process has no terminal or has exited.
        """
        if not self.tty:
            raise CallError("STATE", f"process {self.number} has no terminal; start it with one", "NO_TERMINAL")
        if self._master < 0:
            raise exited_error(self)
        spawn.resize_terminal(self._master, rows, cols)

    def kill(self, number: int) -> None:
        """Send a signal to the process group.

        :raises CallError: the process has exited.
        """
        if self.exit is not None:
            raise exited_error(self)
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            raise exited_error(self) from None


def exited_error(process: Process) -> CallError:
    """Return the error for an operation on a process that has exited."""
    return CallError("STATE", f"process {process.number} has exited already", "PROCESS_EXITED")


def signal_name(number: int) -> str:
    """Return the name of a signal: "SIGTERM" for 15, "SIGRTMIN+n" for real-time signals."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


class ProcessRegistry:
    """Processes that the host has started in this guest: the running ones and the last MAX_EXITED exited ones."""

    def __init__(self, oom: OomWatcher) -> None:
        self.by_number: dict[int, Process] = {}
        self._by_pid: dict[int, Process] = {}
        self._exited: dict[int, None] = {}  # numbers in order of exit
        self._next_number = 1
        self._oom = oom

    def get(self, number: object) -> Process:
        """Return the process with this number.

        :raises CallError: no such process is known.
        """
        process = self.by_number.get(number) if isinstance(number, int) else None
        if process is None:
            raise CallError("NOT_FOUND", f"no process {number!r} in this sandbox; ListProcesses shows the processes")
        return process

    def start(self, argv: list[str], env: dict[str, str], cwd: str, user: User, stdio: Stdio, replay: int) -> Process:
        """Start a process and return it.

        :param replay: size limit of its output log, in bytes.
        :raises CallError: the process cannot be started; `stdio` is closed.
        """
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
        """Remove an exited process from the registry."""
        self.by_number.pop(process.number, None)
        self._exited.pop(process.number, None)

    def restart_numbers(self) -> None:
        """Number processes from 1 again, for a registry that is empty."""
        self._next_number = 1

    async def reap(self) -> None:
        """Collect the exit status of each child; does not return."""
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
