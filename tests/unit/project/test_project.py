"""The project's own files hold together."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RECIPES = [
    "bench", "changelog", "check", "clean", "cover", "demo", "doctor", "hooks", "image", "lint", "proto",
    "proto-lint", "run", "setup", "test", "type",
]  # fmt: skip
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


def _imports_of_google() -> set[str]:
    """Return the modules below the namespace package `google` that our programs import."""
    modules = set()
    for source in [path for package in ("agent", "guest", "rootfs") for path in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("google."):
                spec = importlib.util.find_spec(node.module or "")
                is_package = spec is not None and spec.submodule_search_locations is not None
                modules |= {f"{node.module}.{name.name}" if is_package else str(node.module) for name in node.names}
    return modules


def test_packages_that_provide_google_modules_are_declared() -> None:
    """deptry reads only the first part of a module's name, and several packages share the namespace `google`."""
    owners: dict[Path, str] = {}
    for distribution in importlib.metadata.distributions():
        for path in distribution.files or []:
            if path.parts[0] == "google":
                owners[Path(str(distribution.locate_file(path)))] = distribution.name
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = {re.split(r"[<>=\[]", dependency)[0] for dependency in dependencies}
    imported = _imports_of_google()
    assert "google.rpc.error_details_pb2" in imported
    for module in sorted(imported):
        spec = importlib.util.find_spec(module)
        assert spec is not None, module
        assert spec.origin is not None, module
        assert owners[Path(spec.origin)] in declared, module


@pytest.mark.parametrize("path", sorted((ROOT / "changelog.d").glob("*.*.md")), ids=lambda path: path.name)
def test_changelog_fragments_are_sentences(path: Path) -> None:
    """Names and types are checked by towncrier in `just lint`; an empty fragment passes there."""
    text = path.read_text()
    assert re.fullmatch(r"[^\s#*-](?:[^\n]|\n(?=\S)){20,400}\.\n", text), "a paragraph of one or two sentences, no list"


def test_a_development_version_is_older_than_its_release_for_dpkg() -> None:
    spec = importlib.util.spec_from_file_location("build_deb", ROOT / "systemd/build_deb.py")
    assert spec is not None
    assert spec.loader is not None
    build_deb = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_deb)
    pep440 = ("0.1.0", "0.2.0.dev0", "0.2.0a1", "0.2.0rc1", "0.2.0")
    versions = [build_deb.debian_version(version) for version in pep440]
    assert versions == ["0.1.0", "0.2.0~dev0", "0.2.0~a1", "0.2.0~rc1", "0.2.0"]
    if shutil.which("dpkg") is not None:
        for older, newer in (("0.1.0", versions[1]), (versions[1], "0.2.0"), (versions[2], versions[3])):
            subprocess.run(["dpkg", "--compare-versions", older, "lt", newer], check=True)
