"""Control groups (cgroup v2: the kernel's Documentation/admin-guide/cgroup-v2.rst), one for each sandbox: its VMM and
the VMM's helpers.

On a hybrid host, whose controllers belong to cgroup v1, the groups are made all the same, and limit nothing.
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
_END_S = 2.0  # for what SIGKILL has ended to be gone
_LOOK_S = 0.002
_NOTHING = "no sandbox's CPU, memory, tasks or I/O is limited"


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """What a sandbox's processes may use together.

    :param cpus: of the host's. :param weight: of one CPU in contention is 100.
    :param io: bytes and operations per second of the disk `device` ("major:minor"), each way; 0: no limit.
    """

    cpus: float
    weight: int
    memory_bytes: int
    tasks: int
    device: str = ""
    io_bytes: int = 0
    io_operations: int = 0

    def files(self) -> dict[str, dict[str, str]]:
        """Returns what to write, by controller and by file."""
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
    """Returns where cgroup v2 is mounted (proc_pid_mountinfo(5)); None: nowhere."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        if source.split()[0] == "cgroup2":
            return Path(mount.split()[4])
    return None


def _words(path: Path) -> frozenset[str]:
    try:
        return frozenset(path.read_text().split())
    except OSError:
        return frozenset()


def available() -> tuple[str, ...]:
    """Returns which of the controllers cgroup v2 has on this host."""
    root = hierarchy()
    found = _words(root / "cgroup.controllers") if root is not None else ()
    return tuple(name for name in CONTROLLERS if name in found)


def block_device(path: Path) -> str:
    """Returns the whole disk that a path lies on as "major:minor"; "" if it lies on none."""
    number = path.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not entry.exists():
        return ""
    whole = entry.resolve().parent if (entry / "partition").exists() else entry
    return (whole / "dev").read_text().strip()


@dataclass(frozen=True, slots=True)
class Cgroups:
    """The groups of one node's sandboxes.

    :param directory: the group above them; None: there can be none. :param parent: its path below the hierarchy.
    :param controllers: those that it hands on. :param degraded: a sentence for each thing that is not limited.
    """

    directory: Path | None
    parent: str = ""
    controllers: frozenset[str] = frozenset()
    degraded: tuple[str, ...] = field(default=())

    @classmethod
    def open(cls, parent: str) -> Cgroups:
        """Makes the group `parent` (a path below the hierarchy) unless it is there, and has it hand on all it can."""
        if not parent.strip("/"):
            return cls(None, degraded=(f"{_NOTHING}: cgroups.parent is empty",))
        root = hierarchy()
        if root is None:
            return cls(None, degraded=(f"{_NOTHING}: cgroup v2 is not mounted",))
        directory = root / parent.strip("/")
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return cls(None, degraded=(f"{_NOTHING}: cannot make the cgroup {parent}: {error.strerror}",))
        reasons = _hand_on(root, directory)
        return cls(directory, parent, _words(directory / "cgroup.subtree_control") & set(CONTROLLERS), tuple(reasons))

    def path(self, sandbox_id: str) -> Path | None:
        """Returns the group of a sandbox, which may not exist."""
        return None if self.directory is None else self.directory / sandbox_id

    def make(self, sandbox_id: str, limits: GroupLimits) -> Path | None:
        """Makes the group of a sandbox, and returns it. :raises HostError:"""
        group = self.path(sandbox_id)
        if group is None:
            return None
        try:
            try:
                group.mkdir(exist_ok=True)
            except FileNotFoundError:  # another agent was the last one in the group above, and removed it
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
        """Ends what is left in the group of a sandbox, and removes it; absence is success. :raises HostError:"""
        group = self.path(sandbox_id)
        if group is None:
            return
        busy = retry_if_exception(lambda error: isinstance(error, OSError) and error.errno == errno.EBUSY)
        removing = Retrying(retry=busy, wait=wait_fixed(_LOOK_S), stop=stop_after_delay(_END_S), reraise=True)
        try:
            removing(_remove, group)
        except OSError as error:
            raise HostError(f"cannot remove {group}: {error.strerror}", reason="REMOVE_FAILED") from error

    def out_of_memory(self, sandbox_id: str) -> bool:
        """Whether the kernel has ended a process of the sandbox for lack of memory; False where that is not counted."""
        group = self.path(sandbox_id)
        if group is None:
            return False
        try:
            events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
        except OSError:
            return False
        return int(events.get("oom_kill", 0)) > 0

    def close(self) -> None:
        """Removes the group above the sandboxes' if there is no other in it."""
        if self.directory is not None:
            with contextlib.suppress(OSError):
                self.directory.rmdir()


def _remove(group: Path) -> None:
    """Remove a group, or end the processes that keep it busy. :raises OSError: it is still there."""
    try:
        group.rmdir()
    except FileNotFoundError:
        return
    except OSError:
        with contextlib.suppress(OSError):  # gone, or a kernel before 5.14: what is left is found by its arguments
            (group / "cgroup.kill").write_text("1")
        raise


def _hand_on(root: Path, directory: Path) -> Iterable[str]:
    """Has every group from the root down to `directory` hand on the controllers; returns why one does not."""
    chain = [directory, *(place for place in directory.parents if place.is_relative_to(root))][::-1]
    missing = {}
    for name in CONTROLLERS:
        for place in chain:
            if name in _words(place / "cgroup.subtree_control"):
                continue
            try:
                (place / "cgroup.subtree_control").write_text(f"+{name}")
            except OSError as error:
                missing[name] = _why(error, place, root)
                break
    reasons: dict[str, list[str]] = {}
    for name, why in missing.items():
        reasons.setdefault(why, []).append(name)
    return [f"sandboxes have no limit of {', '.join(names)}: {why}" for why, names in reasons.items()]


def _why(error: OSError, place: Path, root: Path) -> str:
    if error.errno in (errno.ENOENT, errno.EINVAL):
        return "cgroup v2 has no such controller here; boot the host with systemd.unified_cgroup_hierarchy=1"
    where = "/" if place == root else str(place.relative_to(root))
    if error.errno == errno.EBUSY:
        return f"the cgroup {where} has processes of its own, so it hands nothing on; set cgroups.parent to another one"
    return f"the cgroup {where}: {error.strerror}"
