"""Errors of system calls, with the kernel's own refusals."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.common import libc
from agent.daemon.host import syscalls


@pytest.mark.parametrize(
    ("call", "number", "text"),
    [
        (lambda: libc.prctl(-1, 0), errno.EINVAL, "prctl(-1)"),
        (lambda: syscalls.setns(-1, syscalls.CLONE_NEWNET), errno.EBADF, "setns"),
        (lambda: syscalls.enter_netns("no-such-namespace"), errno.ENOENT, "/run/netns/no-such-namespace"),
        (lambda: syscalls.mount("none", Path("/no/such/place"), "tmpfs", 0), errno.ENOENT, "mount none at /no/such"),
        (lambda: syscalls.umount(Path("/no/such/place")), errno.ENOENT, "umount /no/such/place"),
        (lambda: syscalls.unshare(-1), errno.EINVAL, "unshare"),
        (lambda: syscalls.pivot_root("/no/such/place", "/no/such/place"), errno.ENOENT, "pivot_root"),
    ],
)
def test_refusal_is_an_os_error_with_number_and_object(call: Callable[[], None], number: int, text: str) -> None:
    with pytest.raises(OSError, match=re.escape(text)) as caught:
        call()
    assert caught.value.errno in (number, errno.EPERM if os.geteuid() else number)


def test_landlock_abi_is_a_version_or_none() -> None:
    assert syscalls.landlock_abi() == -1 or syscalls.landlock_abi() >= 1


def test_name_of_the_thread_is_set() -> None:
    path = Path("/proc/thread-self/comm")
    before = path.read_text().strip()
    libc.prctl(15, b"renamed")
    try:
        assert path.read_text() == "renamed\n"
    finally:
        libc.prctl(15, before.encode())
