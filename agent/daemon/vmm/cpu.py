"""What of the host's CPU a guest with `-cpu host` sees: part of what a snapshot depends on."""

from __future__ import annotations

import hashlib
from pathlib import Path

_FIELDS = ("vendor_id", "cpu family", "model", "stepping", "flags")


def cpu_key(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns 16 hex digits that are equal on hosts whose CPUs offer the same (proc_cpuinfo(5))."""
    facts: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in _FIELDS:
            facts.setdefault(name.strip(), " ".join(sorted(value.split())))
    text = "\n".join(f"{name}={facts.get(name, '')}" for name in _FIELDS)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
