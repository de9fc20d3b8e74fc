"""docs/configuration.md lists every setting with its default."""

from __future__ import annotations

import dataclasses
import re
import socket
from pathlib import Path, PurePath
from typing import Any

import pytest

from agent.common.config.loading import merge_reloaded
from agent.common.config.settings import Settings
from agent.common.quantities import parse_duration, parse_size

PAGE = (Path(__file__).parents[3] / "docs/configuration.md").read_text()
SETTINGS = Settings()
NAMES = [
    f"{section.name}.{key.name}"
    for section in dataclasses.fields(Settings)
    for key in dataclasses.fields(getattr(SETTINGS, section.name))
]


def _rows() -> dict[str, tuple[str, str]]:
    """Return section.key -> (default as the page writes it, meaning)."""
    found: dict[str, tuple[str, str]] = {}
    section = ""
    for line in PAGE.splitlines():
        if heading := re.match(r"## `\[(\w+)\]`", line):
            section = heading[1]
        elif row := re.match(r"\| `([\w.]+)` \| (.+?) \| (.+) \|$", line):
            name = row[1] if "." in row[1] else f"{section}.{row[1]}"
            assert name not in found, name
            found[name] = row[2], row[3]
    return found


ROWS = _rows()


def _written(value: Any) -> list[str]:
    """Return the forms in which the page may write a default."""
    if value == socket.gethostname():
        return ["the host name"]
    if isinstance(value, bool):
        return [f"`{str(value).lower()}`"]
    if isinstance(value, int | float):
        return [f"`{value}`"]
    if isinstance(value, str | PurePath):
        return [f'`"{value}"`']
    return ["`{}`"] if isinstance(value, dict) else ["`[]`"]


def _same(value: Any, cell: str) -> bool:
    if cell in _written(value):
        return True
    if isinstance(value, bool):
        return False  # an int to Python
    text = cell.strip("`")
    try:
        return value in {parse_size(text)} if isinstance(value, int) else value == parse_duration(text)
    except ValueError:
        return False


def test_every_setting_is_on_the_page_and_no_other() -> None:
    assert sorted(ROWS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_the_code(name: str) -> None:
    section, key = name.split(".")
    value = getattr(getattr(SETTINGS, section), key)
    assert _same(value, ROWS[name][0]), (name, value, ROWS[name][0])


def test_a_wrong_default_is_noticed() -> None:
    assert _same(512 << 20, "`512MiB`")
    assert _same(300.0, "`5m`")
    assert not _same(512 << 20, "`256MiB`")
    assert not _same(300.0, "`6m`")
    assert not _same(True, "`1`")
    assert not _same("auto", "`auto`")


@pytest.mark.parametrize("name", NAMES)
def test_settings_that_a_reload_applies_are_marked(name: str) -> None:
    section, key = name.split(".")
    values = getattr(SETTINGS, section)
    other = dataclasses.replace(SETTINGS, **{section: dataclasses.replace(values, **{key: object()})})
    changed = merge_reloaded(SETTINGS, other)[1]
    assert ("**reload**" in ROWS[name][1]) == (changed == [name])
