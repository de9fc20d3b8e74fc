"""Whether this kernel has Landlock as Cloud Hypervisor needs it (landlock_create_ruleset(2))."""

from __future__ import annotations

from agent.daemon.host import syscalls

_MIN_ABI = 3  # vmm/src/landlock.rs at v53.0 demands all of it


def landlock_works() -> bool:
    """Returns whether the kernel offers Landlock's ABI 3 or newer."""
    return syscalls.landlock_abi() >= _MIN_ABI
