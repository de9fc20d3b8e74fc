"""Control groups (cgroup v2), one for each sandbox: its VMM and the VMM's helpers.

Source: the kernel's Documentation/admin-guide/cgroup-v2.rst. On a hybrid host, whose controllers belong to cgroup v1,
the cgroups are made all the same, and limit nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from agent.common.errors import HostError

CONTROLLERS = ("cpu", "memory", "pids", "io")
_PERIOD_US = 100_000
_MAX_WEIGHT = 10_000
_KILL_TIMEOUT_S = 2.0  # from SIGKILL to an empty cgroup
_POLL_S = 0.002
_UNLIMITED = "no sandbox's CPU, memory, tasks or I/O is limited"


@dataclass(frozen=True, slots=True)
class CgroupLimits:
    """Limits on the sum of a sandbox's processes.

    :param cpus: CPU time, in CPUs of the host.
    :param weight: share of contended CPU time; 100 for each CPU is usual.
    :param tasks: number of processes and threads.
    :param device: disk that the I/O limits apply to, as "major:minor"; "": none.
    :param io_bytes: bytes per second, separately for reads and writes; 0: no limit.
    :param io_operations: operations per second, separately for reads and writes; 0: no limit.
    """

    cpus: float
    weight: int
    memory_bytes: int
    tasks: int
    device: str = ""
    io_bytes: int = 0
    io_operations: int = 0

    def files(self) -> dict[str, dict[str, str]]:
        """Return the text for each interface file, as {controller: {file: text}}."""
        io = {"rbps": self.io_bytes, "wbps": self.io_bytes, "riops": self.io_operations, "wiops": self.io_operations}
        words = [f"{name}={value}" for name, value in io.items() if value]
        return {
            "cpu": {
                "cpu.max": f"{max(1000, round(self.cpus * _PERIOD_US))} {_PERIOD_US}",
                "cpu.weight": str(min(self.weight, _MAX_WEIGHT)),
            },
            "memory": {"memory.max": str(self.memory_bytes), "memory.oom.group": "1"},
            "pids": {"pids.max": str(self.tasks)},
            "io": {"io.max": " ".join([self.device, *words])} if self.device and words else {},
        }


def hierarchy() -> Path | None:
    """Return the mount point of cgroup v2 (proc_pid_mountinfo(5)); None if it is not mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        if source.split()[0] == "cgroup2":
            return Path(mount.split()[4])
    return None


def _read_words(path: Path) -> frozenset[str]:
    try:
        return frozenset(path.read_text().split())
    except OSError:
        return frozenset()


def available() -> tuple[str, ...]:
    """Return the members of `CONTROLLERS` that cgroup v2 has on this host."""
    root = hierarchy()
    found = _read_words(root / "cgroup.controllers") if root is not None else ()
    return tuple(name for name in CONTROLLERS if name in found)


def block_device(path: Path) -> str:
    """Return the disk (not the partition) that holds a path, as "major:minor"; "" for a path on no disk."""
    number = path.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not entry.exists():
        return ""
    whole = entry.resolve().parent if (entry / "partition").exists() else entry
    return (whole / "dev").read_text().strip()


@dataclass(frozen=True, slots=True)
class Cgroups:
    """Cgroups of the sandboxes of one node.

    :param directory: the parent cgroup; None on a host without cgroup v2, where `make` does nothing.
    :param parent: path of the parent cgroup below the mount point.
    :param controllers: controllers enabled for the children.
    :param degraded: one message for each limit that cannot be enforced.
    """

    directory: Path | None
    parent: str = ""
    controllers: frozenset[str] = frozenset()
    degraded: tuple[str, ...] = field(default=())

    @classmethod
    def open(cls, parent: str) -> Cgroups:
        """Create the cgroup `parent` (a path below the mount point) unless it exists, and enable its controllers."""
        if not parent.strip("/"):
            return cls(None, degraded=(f"{_UNLIMITED}: cgroups.parent is empty",))
        root = hierarchy()
        if root is None:
            return cls(None, degraded=(f"{_UNLIMITED}: cgroup v2 is not mounted",))
        directory = root / parent.strip("/")
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return cls(None, degraded=(f"{_UNLIMITED}: cannot make the cgroup {parent}: {error.strerror}",))
        reasons = _enable_controllers(root, directory)
        return cls(
            directory, parent, _read_words(directory / "cgroup.subtree_control") & set(CONTROLLERS), tuple(reasons)
        )

    def path(self, sandbox_id: str) -> Path | None:
        """Return the path of a sandbox's cgroup, existing or not; None without cgroup v2."""
        return None if self.directory is None else self.directory / sandbox_id

    def make(self, sandbox_id: str, limits: CgroupLimits) -> Path | None:
        """Create the cgroup of a sandbox, set its limits, and return its path; None without cgroup v2.

        :raises HostError: the kernel refused (CGROUP_FAILED); no cgroup is left.
        """
        group = self.path(sandbox_id)
        if group is None:
            return None
        try:
            try:
                group.mkdir(exist_ok=True)
            except FileNotFoundError:  # another agent removed the empty parent
                Cgroups.open(self.parent)
                group.mkdir()
            for controller, files in limits.files().items():
                if controller not in self.controllers:
                    continue
                for name, text in files.items():
                    (group / name).write_text(text)
        except OSError as error:
            with contextlib.suppress(OSError):
                group.rmdir()
            raise HostError(f"cannot make the cgroup {group}: {error}", reason="CGROUP_FAILED") from error
        return group

    def remove(self, sandbox_id: str) -> None:
        """Kill the processes left in the cgroup of a sandbox, and remove it; a missing one is no error. Blocks.

        :raises HostError: processes survive SIGKILL for 2 s (REMOVE_FAILED).
        """
        group = self.path(sandbox_id)
        if group is None:
            return
        busy = retry_if_exception(lambda error: isinstance(error, OSError) and error.errno == errno.EBUSY)
        removing = Retrying(retry=busy, wait=wait_fixed(_POLL_S), stop=stop_after_delay(_KILL_TIMEOUT_S), reraise=True)
        try:
            removing(_remove, group)
        except OSError as error:
            raise HostError(f"cannot remove {group}: {error.strerror}", reason="REMOVE_FAILED") from error

    def out_of_memory(self, sandbox_id: str) -> bool:
        """Return whether the kernel has OOM-killed a process of the sandbox; False without a memory controller."""
        group = self.path(sandbox_id)
        if group is None:
            return False
        try:
            events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
        except OSError:
            return False
        return int(events.get("oom_kill", 0)) > 0

    def close(self) -> None:
        """Remove the parent cgroup unless it has children."""
        if self.directory is not None:
            with contextlib.suppress(OSError):
                self.directory.rmdir()


def _remove(group: Path) -> None:
    """Remove a cgroup, or kill the processes that keep it busy.

    :raises OSError: the cgroup is still there.
    """
    try:
        group.rmdir()
    except FileNotFoundError:
        return
    except OSError:
        with contextlib.suppress(OSError):  # gone, or a kernel before 5.14: `resources.kill_strays` finds the rest
            (group / "cgroup.kill").write_text("1")
        raise


def _enable_controllers(root: Path, directory: Path) -> Iterable[str]:
    """Enable the controllers in every cgroup from the root to `directory`; return one message per failure's cause."""
    chain = [directory, *(cgroup for cgroup in directory.parents if cgroup.is_relative_to(root))][::-1]
    missing = {}
    for name in CONTROLLERS:
        for cgroup in chain:
            if name in _read_words(cgroup / "cgroup.subtree_control"):
                continue
            try:
                (cgroup / "cgroup.subtree_control").write_text(f"+{name}")
            except OSError as error:
                missing[name] = _explain(error, cgroup, root)
                break
    reasons: dict[str, list[str]] = {}
    for name, why in missing.items():
        reasons.setdefault(why, []).append(name)
    return [f"sandboxes have no limit of {', '.join(names)}: {why}" for why, names in reasons.items()]


def _explain(error: OSError, cgroup: Path, root: Path) -> str:
    if error.errno in (errno.ENOENT, errno.EINVAL):
        return "cgroup v2 has no such controller here; boot the host with systemd.unified_cgroup_hierarchy=1"
    where = "/" if cgroup == root else str(cgroup.relative_to(root))
    if error.errno == errno.EBUSY:
        return (
            f"the cgroup {where} has processes of its own, so it has no controllers; set cgroups.parent to another one"
        )
    return f"the cgroup {where}: {error.strerror}"
