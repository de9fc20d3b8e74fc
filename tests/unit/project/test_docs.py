"""What the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent.gateway.methods.table import METHODS

ROOT = Path(__file__).parents[3]
SDK = (ROOT / "docs/deno-sdk.md").read_text()
SUITES = {path.name.removesuffix(".test.mjs"): path.read_text() for path in (ROOT / "tests/sdk/js").glob("*.test.mjs")}
PYTHON = "".join(path.read_text() for path in (ROOT / "tests/sdk").rglob("*.py") if "node_modules" not in path.parts)


def test_every_test_that_the_sdk_table_names_exists() -> None:
    rows = [line for line in SDK.splitlines() if line.startswith("| ") and line.count("|") == 5]
    assert len(rows) > 45
    for row in rows:
        named = re.findall(r"`(\w+): ([^`]+)`", row.rpartition(" | ")[2]) + re.findall(
            r"`(test_)(\w+)`", row.rpartition(" | ")[2]
        )
        if row.startswith(("| JavaScript",)):
            continue
        assert named or "in the image" in row, row
        for suite, title in named:
            found = f"def test_{title}(" in PYTHON if suite == "test_" else f'test("{title}' in SUITES.get(suite, "")
            assert found, (suite, title)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_used_by_a_suite(name: str) -> None:
    """Each of the 54 methods is called by a real SDK somewhere: by its own name, or by what leads to it."""
    leads = {
        "abort": "AbortController", "fileClose": ".close()", "fileLock": ".lock(", "fileRead": ".read(",
        "fileSeek": ".seek(",
        "fileStat": ".stat()", "fileSync": ".sync()", "fileSyncData": ".syncData()", "fileTruncate": ".truncate(",
        "fileUnlock": ".unlock()", "fileUtime": ".utime(", "fileWrite": ".write(", "processWait": ".status",
        "processKill": ".kill(", "spawnDeno": "deno.run(", "denoHttpWait": "httpReady", "spawnDenoRepl": "deno.repl(",
        "denoReplEval": "repl.eval(", "denoReplCall": "repl.call(", "denoReplClose": "repl.close(",
        "envGet": "env.get(",
        "envSet": "env.set(", "envToObject": "env.toObject(", "envDelete": "env.delete(", "vscode": "exposeVscode(",
    }  # fmt: skip
    assert leads.get(name, f".{name}(") in "".join(SUITES.values())


def test_every_test_that_the_threat_model_names_exists() -> None:
    sources = "".join(
        path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if "node_modules" not in path.parts
    )
    rows = [line for line in (ROOT / "docs/threat-model.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 5
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        for name in named:
            assert f"def {name}(" in sources, name
