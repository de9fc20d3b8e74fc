"""Whether this kernel has Landlock as Cloud Hypervisor needs it (landlock_create_ruleset(2))."""

from __future__ import annotations

import ctypes

_SYS_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_CREATE_RULESET_VERSION = 1
_MIN_ABI = 3  # vmm/src/landlock.rs at v53.0 demands all of it


def landlock_works() -> bool:
    """Returns whether the kernel offers Landlock's ABI 3 or newer."""
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION)) >= _MIN_ABI
