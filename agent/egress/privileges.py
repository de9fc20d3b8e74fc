"""Dropping privileges before the first byte of a guest is read: root, capabilities, core dumps, set-user-ID."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

from agent.common.errors import HostError
from agent.common.libc import prctl

_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NAME, _PR_SET_NO_NEW_PRIVS = 4, 24, 15, 38  # prctl(2)
_LAST_CAPABILITY_FILE = "/proc/sys/kernel/cap_last_cap"
_WANTED_FILES = 1 << 20


def set_name(name: str) -> None:
    """Set the process name that ps and the kernel log show, cut to 15 bytes."""
    prctl(_PR_SET_NAME, name.encode()[:15])


def raise_file_limit() -> int:
    """Raise RLIMIT_NOFILE as far as possible and return it. A connection takes two to six descriptors."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        highest = min(_WANTED_FILES, int(Path("/proc/sys/fs/nr_open").read_text()))
    except OSError:  # hidden by systemd's sandboxing; LimitNOFILE= of the unit sets the limit then
        highest = hard
    if hard < highest:
        with contextlib.suppress(OSError, ValueError):  # some containers forbid it even for root
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, highest))
            return highest
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def drop(uid: int, gid: int) -> None:
    """Become this user irrevocably, without groups, capabilities, core dumps and set-user-ID programs.

    A process that is not root keeps its user and only does the steps that need no privilege.

    :raises HostError: a step failed, or the process is still root.
    """
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if os.geteuid() == 0:
            last = int(Path(_LAST_CAPABILITY_FILE).read_text())
            for capability in range(last + 1):
                prctl(_PR_CAPBSET_DROP, capability)
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)  # from root to another user: the kernel clears all capability sets
        prctl(_PR_SET_NO_NEW_PRIVS, 1)
        prctl(_PR_SET_DUMPABLE, 0)  # only root may trace it or read its memory
    except OSError as error:
        raise HostError(f"cannot drop privileges: {error}", reason="EGRESS_NOT_STARTED") from error
    if uid and (os.geteuid() == 0 or os.getegid() == 0):
        raise HostError("the egress process is still root after dropping privileges", reason="EGRESS_NOT_STARTED")
