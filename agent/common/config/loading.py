"""Load the settings from a TOML file and the environment, and merge them when they are loaded again.

The variable `SANDBOXD_<SECTION>__<KEY>` overrides a key of the file. An unknown section or key is an error that names
the nearest known one. No other module reads settings from the environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from agent.common.config.settings import Settings, check
from agent.common.errors import ConfigError
from agent.common.quantities import converted

ENV_PREFIX = "SANDBOXD_"
DEFAULT_CONFIG = Path("/etc/sandboxd/config.toml")


# Settings that are read at each use. Changes of all others take effect at the next start.
_RELOADABLE = {
    "node": frozenset(
        {
            "labels", "max_sandboxes", "cpu_overcommit", "memory_overcommit", "reserved_memory_bytes",
            "reserved_disk_bytes", "quotas", "queue_length", "queue_timeout_s", "max_memory_pressure",
        }
    ),
    "log": frozenset({"level"}),
}  # fmt: skip


def load(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Return the settings from a file and the environment, checked.

    :param path: of the file; default: /etc/sandboxd/config.toml if it exists.
    :param environ: environment variables; default: those of this process.
    :raises ConfigError: the file cannot be read, a key is unknown, or a value is not valid.
    """
    raw = _read(path)
    for name, text in (os.environ if environ is None else environ).items():
        section, separator, key = name.removeprefix(ENV_PREFIX).lower().partition("__")
        if name.startswith(ENV_PREFIX) and separator:
            values = raw.setdefault(section, {})
            if isinstance(values, dict):
                values[key] = text
    return _build(raw)


def _read(path: Path | None) -> dict[str, Any]:
    if path is None and not DEFAULT_CONFIG.exists():
        return {}
    path = path or DEFAULT_CONFIG
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _build(raw: dict[str, Any]) -> Settings:
    sections = get_type_hints(Settings)
    _refuse_unknown(raw, sections, "section")
    built: dict[str, Any] = {}
    for name, kind in sections.items():
        values = raw.get(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{name} must be a table: write [{name}]")
        hints = get_type_hints(kind, include_extras=True)
        _refuse_unknown(values, hints, "key", f"{name}.")
        built[name] = kind(**{key: _convert(f"{name}.{key}", hints[key], value) for key, value in values.items()})
    settings = Settings(**built)
    check(settings)
    return settings


def _refuse_unknown(given: Mapping[str, Any], known: Mapping[str, Any], what: str, prefix: str = "") -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are: {', '.join(known)}"
            raise ConfigError(f"unknown {what} {prefix}{name}; {hint}", reason="UNKNOWN_KEY")


def _convert(name: str, kind: Any, value: Any) -> Any:
    try:
        return converted(kind, value)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def merge_reloaded(current: Settings, loaded: Settings) -> tuple[Settings, list[str], list[str]]:
    """Return the settings to use from now on, the keys that changed, and the keys whose change needs a restart."""
    changed, need_restart, sections = [], [], {}
    for section in dataclasses.fields(Settings):
        before, after = getattr(current, section.name), getattr(loaded, section.name)
        values = {}
        for key in dataclasses.fields(before):
            if getattr(before, key.name) == getattr(after, key.name):
                continue
            if key.name in _RELOADABLE.get(section.name, ()):
                values[key.name] = getattr(after, key.name)
                changed.append(f"{section.name}.{key.name}")
            else:
                need_restart.append(f"{section.name}.{key.name}")
        sections[section.name] = dataclasses.replace(before, **values)
    return Settings(**sections), changed, need_restart
