"""Features of this host that VMMs depend on: CPU model and flags, Landlock."""

from __future__ import annotations

import hashlib
from pathlib import Path

from agent.daemon.host import syscalls

_CPU_FIELDS = ("vendor_id", "cpu family", "model", "stepping", "flags")
_MIN_LANDLOCK_ABI = 3  # Cloud Hypervisor needs all of it: vmm/src/landlock.rs at v53.0


def cpu_key(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return 16 hex digits that are equal on hosts with the same CPU features (proc_cpuinfo(5)).

    A guest under KVM sees these features (`-cpu host`), so its snapshot can only be restored where they are equal.
    """
    facts: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in _CPU_FIELDS:
            facts.setdefault(name.strip(), " ".join(sorted(value.split())))
    text = "\n".join(f"{name}={facts.get(name, '')}" for name in _CPU_FIELDS)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def landlock_works() -> bool:
    """Return whether the kernel offers Landlock ABI 3 or newer (landlock_create_ruleset(2))."""
    return syscalls.landlock_abi() >= _MIN_LANDLOCK_ABI
