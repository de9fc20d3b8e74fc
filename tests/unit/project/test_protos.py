"""`just proto-lint` sees changes of the API that would break clients of the last release."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BUF = Path(sys.executable).with_name("buf")


def _release() -> Path:
    """Return the protos that `just proto-lint` compares with."""
    found = re.search(r'^released_protos := "(.+)"$', (ROOT / "Justfile").read_text(), re.MULTILINE)
    assert found is not None
    return ROOT / found[1]


def _breaking(checkout: Path) -> subprocess.CompletedProcess[str]:
    argv = [str(BUF), "breaking", "--against", str(_release())]
    return subprocess.run(argv, cwd=checkout, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the protos and of buf's configuration."""
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    return tmp_path


def test_the_last_release_is_compared_with() -> None:
    releases = [path for path in (ROOT / "tests/protos").iterdir() if path.is_dir()]
    assert _release() == max(releases, key=lambda path: tuple(int(part) for part in path.name.split(".")))


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "said"),
    [
        ("sandbox.proto", r"string image = ", "string image_name = ", 'from "image" to "image_name"'),
        ("sandbox.proto", r"string image = (\d+);", r"bytes image = \1;", 'from "string" to "bytes"'),
        ("node.proto", r"rpc GetNode\(", "rpc ReadNode(", '"GetNode"'),
        ("file.proto", r"WHENCE_END = 2;", "WHENCE_LAST = 2;", '"WHENCE_END"'),
    ],
    ids=["field renamed", "type changed", "method renamed", "enum value renamed"],
)
def test_a_breaking_change_is_refused(checkout: Path, file: str, pattern: str, replacement: str, said: str) -> None:
    assert _breaking(checkout).returncode == 0
    path = checkout / "proto/sandboxd/v1" / file
    text, count = re.subn(pattern, replacement, path.read_text())
    assert count > 0
    path.write_text(text)
    refused = _breaking(checkout)
    assert refused.returncode == 100
    assert said in refused.stdout


def test_a_new_field_is_no_breaking_change(checkout: Path) -> None:
    path = checkout / "proto/sandboxd/v1/node.proto"
    path.write_text(
        path.read_text().replace("message GetNodeRequest {", "message GetNodeRequest {\n  string added = 900;", 1)
    )
    assert "added = 900" in path.read_text()
    assert _breaking(checkout).returncode == 0
