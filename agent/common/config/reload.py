"""Settings read again while the agent runs (SIGHUP): what can change changes, and the rest is told of."""

from __future__ import annotations

import dataclasses

from agent.common.config.settings import Settings

# What an agent reads at each use; all else is built into what was made at its start.
_CHANGEABLE = {
    "node": frozenset(
        {
            "labels", "max_sandboxes", "cpu_overcommit", "memory_overcommit", "reserved_memory_bytes",
            "reserved_disk_bytes", "quotas", "queue_length", "queue_timeout_s", "max_memory_pressure",
        }
    ),
    "log": frozenset({"level"}),
}  # fmt: skip


def merged(present: Settings, read: Settings) -> tuple[Settings, list[str], list[str]]:
    """Returns the settings to go on with, the names of those that changed, and of those that need a restart to."""
    changed, waiting, sections = [], [], {}
    for section in dataclasses.fields(Settings):
        before, after = getattr(present, section.name), getattr(read, section.name)
        values = {}
        for key in dataclasses.fields(before):
            if getattr(before, key.name) == getattr(after, key.name):
                continue
            if key.name in _CHANGEABLE.get(section.name, ()):
                values[key.name] = getattr(after, key.name)
                changed.append(f"{section.name}.{key.name}")
            else:
                waiting.append(f"{section.name}.{key.name}")
        sections[section.name] = dataclasses.replace(before, **values)
    return Settings(**sections), changed, waiting
