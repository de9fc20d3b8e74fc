"""A process of the host (a VMM, the egress process): started inside a network namespace, watched through its pidfd,
found again after an agent's restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.common.aio import to_the_end
from agent.common.errors import VmmError
from agent.daemon.host import root_view
from agent.daemon.host.root_view import View
from agent.daemon.host.syscalls import enter_netns
from agent.daemon.host.threads import run_in_thread

_STDERR_TAIL_BYTES = 4096


def start_time(pid: int) -> int:
    """Returns when the process started, in clock ticks since boot (field 22 of proc_pid_stat(5)); 0 if it is gone, or
    has ended and only waits for its parent.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    fields = stat.rpartition(b")")[2].split()
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


@dataclass(frozen=True, slots=True)
class ExitInfo:
    """How a VMM process ended: exactly one of `exit_code` and `signal` is set; both are None if it was not our
    child.
    """

    exit_code: int | None
    signal: int | None
    stderr_tail: str

    def describe(self) -> str:
        """One phrase for error messages."""
        if self.signal is not None:
            return f"killed by signal {self.signal}"
        if self.exit_code is not None:
            return f"exited with status {self.exit_code}"
        return "ended"


class HostProcess:
    """One process, by pidfd: waiting for it never confuses it with another that got its PID."""

    def __init__(
        self, pid: int, stderr_path: Path, *, is_child: bool, placing: asyncio.Future[None] | None = None
    ) -> None:
        self.pid = pid
        self._placing = placing
        self._stderr_path = stderr_path
        self._is_child = is_child
        self._pidfd = os.pidfd_open(pid)
        self.start_time = start_time(pid)  # only now: the other way round, it could be that of an earlier process
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[ExitInfo] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._on_exit)

    @property
    def alive(self) -> bool:
        """Whether the process has not ended yet, as far as the event loop knows."""
        return not self._ended.done()

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        code: int | None = None
        number: int | None = None
        if self._is_child:
            with contextlib.suppress(ChildProcessError):
                status = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
                if status is not None and status.si_code == os.CLD_EXITED:
                    code = status.si_status
                elif status is not None:
                    number = status.si_status
        os.close(self._pidfd)
        if not self._ended.done():
            self._ended.set_result(ExitInfo(code, number, self.stderr_tail()))

    def stderr_tail(self) -> str:
        """Returns the end of what the process wrote to stderr."""
        try:
            with self._stderr_path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _STDERR_TAIL_BYTES))
                return file.read().decode(errors="replace").strip()
        except OSError:
            return ""

    async def wait(self) -> ExitInfo:
        """Returns once the process has ended; cancellation leaves it alone."""
        return await asyncio.shield(self._ended)

    async def placed(self) -> None:
        """Returns once the process is in its control group. :raises VmmError: it could not be moved there."""
        if self._placing is None:
            return
        try:
            await asyncio.shield(self._placing)
        except OSError as error:
            raise VmmError(f"cannot move process {self.pid} to its cgroup: {error}", reason="CGROUP_FAILED") from error

    def forget(self) -> None:
        """Stops watching the process and leaves it alone; this object is of no more use."""
        if self.alive:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)

    async def kill(self) -> None:
        """Ensures that the process is gone (SIGKILL). Idempotent."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        await self.wait()


def adopt(pid: int, started: int, stderr_path: Path) -> HostProcess | None:
    """Returns the process that had `pid` and started at `started`, or None if it is gone."""
    if started == 0 or start_time(pid) != started:
        return None
    try:
        process = HostProcess(pid, stderr_path, is_child=False)
    except OSError:
        return None
    if process.start_time == started:
        return process
    process.forget()  # the PID changed hands between the two looks
    return None


@dataclass(frozen=True, slots=True)
class Confinement:
    """What a process may not do: it has no capability and cannot get one, and may run as another user than the agent.

    :param uid: the user to run as, for an agent that is root; None: the agent's own.
    """

    uid: int | None = None
    gid: int = 0

    def argv(self, argv: Sequence[str]) -> list[str]:
        """Returns the words that start `argv` so confined, by setpriv(1): the process keeps its PID.

        :raises VmmError: setpriv is missing.
        """
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise VmmError("setpriv is not installed: install util-linux", reason="VMM_NOT_STARTED")
        words = [setpriv, "--no-new-privs"]
        if os.geteuid() == 0:
            words += ["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]
        if self.uid is not None:
            words += [f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups"]
        return [*words, "--", *argv]


async def spawn(
    argv: Sequence[str],
    *,
    netns: str | None,
    stderr_path: Path,
    pass_fds: Sequence[int] = (),
    output_fds: tuple[int, int] | None = None,
    seen: View | None = None,
    cgroup: Path | None = None,
) -> HostProcess:
    """Starts `argv` in its own session and in the namespace `netns`, with stdout and stderr in a file.

    :param seen: what it has of the host's files; None: all.
    :param cgroup: the control group that it is moved to, which takes the kernel up to 20 ms: `HostProcess.placed`.
    :param output_fds: where stdout and stderr go instead; `stderr_path` is then only read, for the end of stderr.
    :raises VmmError: the program cannot be started.
    """

    def start() -> tuple[int, int | None]:
        # Namespaces belong to threads, and a child starts in its parent thread's: no helper program is needed.
        group = None if cgroup is None else os.open(cgroup / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        try:
            return _spawn_here(argv, netns, stderr_path, pass_fds, output_fds, seen), group
        except BaseException:
            if group is not None:
                os.close(group)
            raise

    try:
        started = run_in_thread("spawn", start, discard=_undo_start)
    except OSError as error:
        raise VmmError(f"cannot start {argv[0]}: {error}", reason="VMM_NOT_STARTED") from error
    try:
        # To the end: a cancelled caller would lose the PID of a process that is about to exist.
        pid, group = await to_the_end(started)
    except asyncio.CancelledError:
        if not started.cancelled() and started.exception() is None:
            _undo_start(started.result())
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in a word
        raise VmmError(f"cannot start {argv[0]}: {error}", reason="VMM_NOT_STARTED") from error
    placing: asyncio.Future[None] | None = None
    try:
        if group is not None:
            placing = run_in_thread("place", functools.partial(_place, pid, group))
            placing.add_done_callback(lambda done: done.exception())  # whoever has ended the process does not ask
        return HostProcess(pid, stderr_path, is_child=True, placing=placing)
    except OSError as error:  # no thread, or no descriptor to watch it with: it would be lost
        _undo_start((pid, None if placing else group))
        raise VmmError(f"cannot start {argv[0]}: {error}", reason="VMM_NOT_STARTED") from error


def _place(pid: int, group: int) -> None:
    """Moves a process to a control group, while it starts already: the kernel waits for all its CPUs meanwhile."""
    try:
        with contextlib.suppress(ProcessLookupError):  # it has ended, which its owner finds out
            os.write(group, str(pid).encode())
    finally:
        os.close(group)


def _undo_start(started: tuple[int, int | None]) -> None:
    """Ends a process that has no owner yet (its PID, and the open cgroup.procs of its control group)."""
    pid, group = started
    if group is not None:
        os.close(group)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _spawn_here(
    argv: Sequence[str],
    netns: str | None,
    stderr_path: Path,
    pass_fds: Sequence[int],
    output_fds: tuple[int, int] | None,
    seen: View | None,
) -> int:
    if netns is not None:
        enter_netns(netns)
    with contextlib.ExitStack() as opened:
        if output_fds is None:
            file = opened.enter_context(stderr_path.open("ab"))
            output_fds = (file.fileno(), file.fileno())
        if seen is not None:
            root_view.enter(seen)
        process = subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=output_fds[0], stderr=output_fds[1], pass_fds=pass_fds,
            start_new_session=True, cwd="/",
        )  # fmt: skip
    process.returncode = 0  # the pidfd's owner reaps it; subprocess must not
    return process.pid
