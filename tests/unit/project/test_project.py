"""The project's own files hold together."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RECIPES = ["setup", "proto", "image", "demo", "run", "lint", "type", "test", "bench", "doctor", "clean", "check"]
# Written in pieces so that this file does not contain what it looks for.
REGISTRY_HOST = re.compile(
    r"\b(?:deb\.debian|security\.debian|snapshot\.debian|pypi|pythonhosted|npmjs)\.(?:org|com)\b"
)


def _tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_shell_scripts_parse() -> None:
    for name in ("bootstrap.sh", ".ci/run"):
        subprocess.run(["bash", "-n", ROOT / name], check=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_says_what_it_does(recipe: str) -> None:
    text = (ROOT / "Justfile").read_text()
    assert re.search(rf"^# .+\n{recipe}\b.*:", text, re.MULTILINE)


def test_nothing_generated_is_committed() -> None:
    assert [name for name in _tracked() if name.startswith("sandboxd/") or name.endswith((".pyc", "_pb2.py"))] == []


def test_no_file_names_a_registry_but_the_lock() -> None:
    named = []
    for name in _tracked():
        if name != "uv.lock" and REGISTRY_HOST.search((ROOT / name).read_text(errors="replace")):
            named.append(name)
    assert named == []


def test_entry_points_exist() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for target in scripts.values():
        module, function = target.split(":")
        source = (ROOT / Path(*module.split("."))).with_suffix(".py")
        assert f"def {function}(" in source.read_text()


def test_ignored_rules_have_reasons() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("[tool.ruff.lint]\n") :]
    lines = block[block.index("ignore = [\n") + 11 : block.index("\n]\n")].splitlines()
    assert lines
    assert [line for line in lines if "#" not in line] == []
