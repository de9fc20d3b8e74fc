"""What a test must leave as it found it: processes, namespaces, taps, mounts, cgroups and directories of ours.

Other test runs and a live sandboxd may share the host: what their processes use is neither reported nor removed.

Plain reads of /proc and of a few directories, since it runs around every test (about a millisecond).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from agent.daemon.host import cgroup

PREFIX = "sbx-"
NETNS_DIR = Path("/run/netns")
NET_DIR = Path("/sys/class/net")
CGROUP = "sandboxd"  # what the group above those of sandboxes is called, or begins with
# The kernel keeps fifteen bytes of a process's name; a VMM carries that of its sandbox.
COMMANDS = ("qemu-system", PREFIX, "vhost-device-v", "cloud-hyperviso", "sandboxd")
# In the environment of all that a test run starts; its value is the run's PID.
MARK = "TEST_RUN_PID"
# What ends on its own: a killed process is reaped, a cancelled task's directory goes.
GRACE_S = 3.0
RUN_DIR = "/run/sandboxd/"  # of a daemon with default settings
_COMM_BYTES = 15
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)
_made: set[str] = set()


@dataclass(frozen=True)
class Snapshot:
    """What of ours exists at one moment."""

    processes: frozenset[tuple[int, str]] = field(default_factory=frozenset)
    namespaces: frozenset[str] = field(default_factory=frozenset)
    interfaces: frozenset[str] = field(default_factory=frozenset)
    mounts: frozenset[str] = field(default_factory=frozenset)
    directories: frozenset[str] = field(default_factory=frozenset)
    cgroups: frozenset[str] = field(default_factory=frozenset)

    def since(self, before: Snapshot) -> Snapshot:
        """Returns what came since `before`."""
        return Snapshot(
            self.processes - before.processes,
            self.namespaces - before.namespaces,
            self.interfaces - before.interfaces,
            self.mounts - before.mounts,
            self.directories - before.directories,
            self.cgroups - before.cgroups,
        )

    def describe(self) -> list[str]:
        """Returns a line for each thing."""
        lines = [f"process {pid} ({name})" for pid, name in sorted(self.processes)]
        lines += [f"network namespace {name}" for name in sorted(self.namespaces)]
        lines += [f"network interface {name}" for name in sorted(self.interfaces)]
        lines += [f"mount {path}" for path in sorted(self.mounts)]
        lines += [f"directory {path}" for path in sorted(self.directories)]
        lines += [f"cgroup {path}" for path in sorted(self.cgroups)]
        return lines


def make_directory() -> Path:
    """Make a directory with a short path, for unix sockets lie below it; it is a leak unless the test removes it.

    Only directories made here are looked at: those of other test runs on this host are not ours to miss or remove.
    """
    path = Path(tempfile.mkdtemp(prefix=PREFIX))
    _made.add(str(path))
    return path


def _names(directory: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(directory))
    except FileNotFoundError:
        return frozenset()


def _process(pid: int) -> tuple[str, int, str] | None:
    """Returns name, parent and state of a process (proc_pid_stat(5)), or None when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    name, _, rest = stat.partition("(")[2].rpartition(")")
    state, parent = rest.split()[:2]
    return name, int(parent), state


def _is_of_this_run(pid: int) -> bool:
    """Whether a process has our mark in its environment: a virtual machine of another run is not ours to end."""
    mark = f"{MARK}={os.environ.get(MARK, os.getpid())}"
    try:
        return mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return False


def _known_processes() -> dict[int, tuple[str, int, str]]:
    """Return name, parent and state of every process, by PID."""
    known = ((int(entry), _process(int(entry))) for entry in os.listdir("/proc") if entry.isdigit())
    return {pid: facts for pid, facts in known if facts is not None}


def _processes() -> frozenset[tuple[int, str]]:
    """Returns the VMMs and daemons that we started and our own children; zombies of ours are leaks, too."""
    me = os.getpid()
    found = set()
    for pid, (name, parent, state) in _known_processes().items():
        if pid == me:
            continue
        if parent == me or (name.startswith(COMMANDS) and state != "Z" and _is_of_this_run(pid)):
            found.add((pid, name))
    return frozenset(found)


def _mounts() -> frozenset[str]:
    """Returns mount points of ours: below a directory named like a sandbox or below our run directory."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return frozenset(point for point in points if f"/{PREFIX}" in point or point.startswith(RUN_DIR))


def snapshot() -> Snapshot:
    """Returns what exists now."""
    return Snapshot(
        processes=_processes(),
        namespaces=frozenset(name for name in _names(NETNS_DIR) if name.startswith(PREFIX)),
        interfaces=frozenset(name for name in _names(NET_DIR) if name.startswith("tap")),
        mounts=_mounts(),
        directories=frozenset(path for path in _made if Path(path).exists()),
        cgroups=_cgroups(),
    )


_hierarchy = functools.cache(cgroup.hierarchy)


def _cgroups() -> frozenset[str]:
    """Returns the control groups of sandboxes, those of a template in the making included."""
    root = _hierarchy()
    above = () if root is None else root.glob(f"{CGROUP}*")
    return frozenset(str(place / name) for place in above for name in _names(place) if name.startswith(PREFIX))


def without_others(found: Snapshot) -> Snapshot:
    """Return `found` without what processes of no run of ours use, and without the rest of the same sandboxes.

    Looks at processes only if something was found that another run or a sandboxd can have made.
    """
    if not (found.namespaces or found.interfaces or found.mounts or found.cgroups):
        return found
    others = _used_by_others(found)

    def is_ours(name: str) -> bool:
        return name[:_COMM_BYTES] not in others

    def is_our_mount(point: str) -> bool:
        names = re.findall(f"/({PREFIX}[^/]*)", point)
        return all(map(is_ours, names)) and not (point.startswith(RUN_DIR) and CGROUP in others)

    return replace(
        found,
        namespaces=frozenset(filter(is_ours, found.namespaces)),
        interfaces=frozenset(filter(is_ours, found.interfaces)),
        mounts=frozenset(filter(is_our_mount, found.mounts)),
        cgroups=frozenset(path for path in found.cgroups if is_ours(Path(path).name)),
    )


def _used_by_others(found: Snapshot) -> set[str]:
    """Return the names, cut like that of a process, of sandboxes, taps and daemons of which another run has a process.

    A sandbox is another's if its VMM is, or any process in its network namespace or its cgroup.
    """
    names = {_identity(NETNS_DIR / name): name for name in found.namespaces}
    own_namespace = _identity(Path("/proc/self/ns/net"))
    users: list[tuple[int, str]] = []
    for pid, (name, _parent, state) in _known_processes().items():
        if state == "Z":
            continue
        if name.startswith((PREFIX, CGROUP)):
            users.append((pid, CGROUP if name.startswith(CGROUP) else name))
        namespace = _identity(Path(f"/proc/{pid}/ns/net"))
        if namespace is not None and namespace in names:
            users.append((pid, names[namespace]))
        if found.interfaces and namespace == own_namespace:
            users += [(pid, tap) for tap in _taps(pid)]
    users += [(pid, Path(group).name) for group in found.cgroups for pid in _members(Path(group))]
    return {name[:_COMM_BYTES] for pid, name in users if not _is_ours(pid)}


def _is_ours(pid: int) -> bool:
    facts = _process(pid)
    return pid == os.getpid() or (facts is not None and facts[1] == os.getpid()) or _is_of_this_run(pid)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode, which name a namespace (namespaces(7)); None if it is gone or not ours to read."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _taps(pid: int) -> list[str]:
    """Return the taps that a process has open (proc_pid_fdinfo(5), drivers/net/tun.c)."""
    taps = []
    with contextlib.suppress(OSError):
        for info in Path(f"/proc/{pid}/fdinfo").iterdir():
            with contextlib.suppress(OSError):
                taps += re.findall(r"^iff:\s*(\S+)", info.read_text(), re.MULTILINE)
    return taps


def _members(group: Path) -> list[int]:
    """Return the processes of a cgroup and those below it; 0 is one of another PID namespace."""
    members: list[int] = []
    for path in (group, *group.rglob("*")):
        with contextlib.suppress(OSError):
            members += map(int, (path / "cgroup.procs").read_text().split())
    return members


def wait_for_leaks(before: Snapshot, grace_s: float = GRACE_S) -> Snapshot:
    """Returns what is still there after `grace_s`; at once when nothing is."""
    deadline = time.monotonic() + grace_s
    while True:
        left = without_others(snapshot().since(before))
        if not left.describe() or time.monotonic() >= deadline:
            return left
        time.sleep(0.02)


def clean(left: Snapshot) -> None:
    """End and remove what leaked, so that the next test starts from nothing; another run may use it by now."""
    left = without_others(left)
    for pid, _name in left.processes:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            continue
    for point in sorted(left.mounts, reverse=True):
        _libc.umount2(os.fsencode(point), _MNT_DETACH)
    for name in left.namespaces:
        _libc.umount2(os.fsencode(NETNS_DIR / name), _MNT_DETACH)
        (NETNS_DIR / name).unlink(missing_ok=True)
    for group in left.cgroups:
        with contextlib.suppress(OSError):
            Path(group).rmdir()
    for path in left.directories:
        shutil.rmtree(path, ignore_errors=True)
