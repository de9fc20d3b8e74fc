"""Host processes (VMM, egress): spawn in a network namespace, watch by pidfd, adopt after a restart of the agent."""

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

from agent.common.aio import run_to_completion
from agent.common.errors import ResourceExhausted, VmmError
from agent.daemon.host.root_view import RootView, enter_root_view
from agent.daemon.host.syscalls import enter_netns
from agent.daemon.host.threads import run_in_thread

_STDERR_TAIL_BYTES = 4096


def start_time(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot (field 22 of proc_pid_stat(5)).

    0 for a process that is gone, or a zombie.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    fields = stat.rpartition(b")")[2].split()
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


@dataclass(frozen=True, slots=True)
class ExitInfo:
    """End of a process: `exit_code` or `signal` is set; both are None for a process that an earlier agent started."""

    exit_code: int | None
    signal: int | None
    stderr_tail: str

    def describe(self) -> str:
        """Return a phrase for error messages, such as "killed by signal 9"."""
        if self.signal is not None:
            return f"killed by signal {self.signal}"
        if self.exit_code is not None:
            return f"exited with status {self.exit_code}"
        return "ended"


class HostProcess:
    """A process watched by its pidfd, which, unlike a PID, never comes to mean another process."""

    def __init__(
        self, pid: int, stderr_path: Path, *, is_child: bool, joining: asyncio.Future[None] | None = None
    ) -> None:
        self.pid = pid
        self._joining = joining
        self._stderr_path = stderr_path
        self._is_child = is_child
        self._pidfd = os.pidfd_open(pid)
        self.start_time = start_time(pid)  # only now: the other way round, it could be that of an earlier process
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[ExitInfo] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._on_exit)

    @property
    def alive(self) -> bool:
        """Whether the process runs, as far as the event loop has noticed."""
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
        """Return the last 4 KiB that the process wrote to stderr; "" without a file."""
        try:
            with self._stderr_path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _STDERR_TAIL_BYTES))
                return file.read().decode(errors="replace").strip()
        except OSError:
            return ""

    async def wait(self) -> ExitInfo:
        """Wait for the end of the process; cancellation does not affect the process."""
        return await asyncio.shield(self._ended)

    async def joined_cgroup(self) -> None:
        """Wait until the process is in its cgroup.

        :raises VmmError: the kernel refused to move it (CGROUP_FAILED).
        """
        if self._joining is None:
            return
        try:
            await asyncio.shield(self._joining)
        except OSError as error:
            raise VmmError(f"cannot move process {self.pid} to its cgroup: {error}", reason="CGROUP_FAILED") from error

    def forget(self) -> None:
        """Stop watching the process, which runs on; this object must not be used any more."""
        if self.alive:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)

    async def kill(self) -> None:
        """Kill the process (SIGKILL) and wait for its end. Idempotent."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        await self.wait()


def adopt(pid: int, started: int, stderr_path: Path) -> HostProcess | None:
    """Return the process `pid` if it started at `started` (see `start_time`); None if it is gone."""
    if started == 0 or start_time(pid) != started:
        return None
    try:
        process = HostProcess(pid, stderr_path, is_child=False)
    except OSError:
        return None
    if process.start_time == started:
        return process
    process.forget()  # the PID was reused between the two checks
    return None


@dataclass(frozen=True, slots=True)
class Confinement:
    """Privileges of a child process: no capabilities, no way to gain any, and optionally another user than the agent's.

    :param uid: the user to run as, for an agent that is root; None: the agent's own.
    """

    uid: int | None = None
    gid: int = 0

    def argv(self, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` with these privileges: by setpriv(1), which keeps the PID.

        :raises VmmError: setpriv is not installed (VMM_NOT_STARTED).
        """
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise VmmError("setpriv is not installed: install util-linux", reason="VMM_NOT_STARTED")
        prefix = [setpriv, "--no-new-privs"]
        if os.geteuid() == 0:
            prefix += ["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]
        if self.uid is not None:
            prefix += [f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups"]
        return [*prefix, "--", *argv]


async def spawn(
    argv: Sequence[str],
    *,
    netns: str | None,
    stderr_path: Path,
    pass_fds: Sequence[int] = (),
    output_fds: tuple[int, int] | None = None,
    root_view: RootView | None = None,
    cgroup: Path | None = None,
) -> HostProcess:
    """Start `argv` in a session of its own, with stdout and stderr appended to `stderr_path`.

    :param netns: name of the network namespace under /run/netns; None: the agent's.
    :param output_fds: stdout and stderr, in place of the file; `stderr_path` is then only read, by `stderr_tail`.
    :param root_view: files of the host that the process sees; None: all.
    :param cgroup: cgroup to move the process to; the kernel takes up to 20 ms, see `HostProcess.joined_cgroup`.
    :raises VmmError: the program cannot be started (VMM_NOT_STARTED).
    :raises ResourceExhausted: no thread can be started for it (TOO_MANY_TASKS).
    """

    def start() -> tuple[int, int | None]:
        # Namespaces belong to threads, and a child starts in its parent thread's: no helper program is needed.
        group = None if cgroup is None else os.open(cgroup / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        try:
            return _spawn_here(argv, netns, stderr_path, pass_fds, output_fds, root_view), group
        except BaseException:
            if group is not None:
                os.close(group)
            raise

    started = run_in_thread("spawn", start, discard=_undo_start)
    try:
        # Uncancellable: a cancelled caller would lose the PID of a process that is about to exist.
        pid, group = await run_to_completion(started)
    except asyncio.CancelledError:
        if not started.cancelled() and started.exception() is None:
            _undo_start(started.result())
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in a word
        raise VmmError(f"cannot start {argv[0]}: {error}", reason="VMM_NOT_STARTED") from error
    joining: asyncio.Future[None] | None = None
    try:
        if group is not None:
            joining = run_in_thread("join-cgroup", functools.partial(_join_cgroup, pid, group))
            # Retrieved: a caller that kills the process does not await the move.
            joining.add_done_callback(lambda done: done.exception())
        return HostProcess(pid, stderr_path, is_child=True, joining=joining)
    except (OSError, ResourceExhausted) as error:  # no descriptor to watch the process with, or no thread
        _undo_start((pid, None if joining else group))  # it would be lost
        if isinstance(error, ResourceExhausted):
            raise
        raise VmmError(f"cannot start {argv[0]}: {error}", reason="VMM_NOT_STARTED") from error


def _join_cgroup(pid: int, group: int) -> None:
    """Move a process to a cgroup while the process starts already: the kernel waits for all CPUs during the move."""
    try:
        with contextlib.suppress(ProcessLookupError):  # it has ended, which its owner notices by itself
            os.write(group, str(pid).encode())
    finally:
        os.close(group)


def _undo_start(started: tuple[int, int | None]) -> None:
    """Kill and reap a process without an owner, given as its PID and the open `cgroup.procs` of its cgroup."""
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
    root_view: RootView | None,
) -> int:
    if netns is not None:
        enter_netns(netns)
    with contextlib.ExitStack() as opened:
        if output_fds is None:
            file = opened.enter_context(stderr_path.open("ab"))
            output_fds = (file.fileno(), file.fileno())
        if root_view is not None:
            enter_root_view(root_view)
        process = subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=output_fds[0], stderr=output_fds[1], pass_fds=pass_fds,
            start_new_session=True, cwd="/",
        )  # fmt: skip
    process.returncode = 0  # HostProcess reaps it by pidfd; subprocess must not
    return process.pid
