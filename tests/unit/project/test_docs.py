"""Paths, links, tests and methods that the documents name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent.gateway.methods.table import METHODS
from tests.tools import reliability

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


# -- paths and links ---------------------------------------------------------------------------------------------------

DOCUMENTS = sorted(
    path
    for pattern in (
        "*.md",
        "docs/*.md",
        "agent/**/README.md",
        "guest/README.md",
        "rootfs/README.md",
        "tests/README.md",
        "tests/protos/README.md",
        "changelog.d/README.md",
    )
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_QUOTED = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FOLDER = re.compile(r"[a-z_]\w*(?:/\w+)*/")
_FILE = re.compile(r"[\w./-]*\w\.(?:py|md|sh|svg|proto|yaml|service|socket)")
_MODULE = re.compile(r"(?:agent|rootfs|tests)(?:\.\w+)+")  # not guest: its phases have such names as well


def _tops() -> set[str]:
    """Return the names at the top of the tree; a path that begins with one of them is meant from there."""
    return {path.name for path in ROOT.iterdir() if path.name not in {".git", ".venv", "sandboxd"}}


def _missing_paths(text: str, folder: Path, tops: set[str]) -> list[str]:
    """Return the quoted paths and modules in a document that do not exist.

    A path is taken from the root, from the document's own folder, or from a folder named before it on the same
    line or the folder above that one. Absolute paths, placeholders and file names without a folder are not looked at.
    """
    missing = []
    for line in _FENCED.sub("", text).splitlines():
        bases = [ROOT, folder]
        for token in _QUOTED.findall(line):
            if _MODULE.fullmatch(token):
                if not _module_exists(token):
                    missing.append(token)
            elif _is_path(token, tops):
                found = next((base / token for base in bases if (base / token).exists()), None)
                if found is None:
                    missing.append(token)
                elif found.is_dir():
                    bases += [found, found.parent]
    return missing


def _module_exists(name: str) -> bool:
    """Whether a dotted name is a package, a module, or something in a module."""
    path = ROOT.joinpath(*name.split("."))
    return any(place.exists() for place in (path, path.with_suffix(".py"), path.parent.with_suffix(".py")))


def _is_path(token: str, tops: set[str]) -> bool:
    if token.startswith("/") or "/" not in token:
        return False
    from_root = token.partition("/")[0] in tops and re.fullmatch(r"[\w./-]+", token)
    return bool(from_root or _FOLDER.fullmatch(token) or _FILE.fullmatch(token))


def _anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _broken_links(text: str, folder: Path, own: str) -> list[str]:
    broken = []
    for link in _LINK.findall(_FENCED.sub("", text)):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = folder / target if target else folder / own
        if not path.exists() or (anchor and anchor not in _anchors(path.read_text())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_and_link_in_a_document_exists(document: Path) -> None:
    text = document.read_text()
    assert _missing_paths(text, document.parent, _tops()) == []
    assert _broken_links(text, document.parent, document.name) == []


def test_paths_and_links_that_do_not_exist_are_noticed() -> None:
    text = """`agent/common/errors.py` `agent/nothing/` `sandbox/vmm_choice.py` `docs/index.md` `/etc/config.toml`
    `agent/daemon/` `rpc/` `net/` `<state_dir>/templates` `203.0.113.0/24`
    `agent.common.errors` `agent.common.errors.AgentError` `agent.peer.Peer` `rpc/`
    [a](index.md) [b](nothing.md) [c](operations.md#alerts) [d](operations.md#nothing) [e](https://example.com/x)
    """
    assert _missing_paths(text, ROOT / "docs", _tops()) == [
        "agent/nothing/", "sandbox/vmm_choice.py", "net/", "agent.peer.Peer", "rpc/",
    ]  # fmt: skip
    assert _broken_links(text, ROOT / "docs", "index.md") == ["nothing.md", "operations.md#nothing"]


def test_the_picture_shows_the_folders_of_the_daemon() -> None:
    shown = re.findall(r">(\w+/)</text>", (ROOT / "docs/data-flow.svg").read_text())
    assert len(shown) >= 6
    assert [name for name in shown if not (ROOT / "agent/daemon" / name).is_dir()] == []


def test_the_index_leads_to_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text()
    pages = [path.name for path in (ROOT / "docs").glob("*.md") if path.name != "index.md"]
    assert [name for name in pages if f"]({name})" not in index] == []


# -- the page of faults ------------------------------------------------------------------------------------------------


def test_the_page_of_faults_is_what_its_generator_makes() -> None:
    text = reliability.PAGE.read_text()
    rows = reliability.rows_of(text)
    assert len(rows) > 50
    assert reliability.page(rows) == text


def test_each_fault_test_is_in_one_group() -> None:
    grouped = [test for tests in reliability.SUBSYSTEMS.values() for test in tests]
    assert sorted(grouped) == sorted(set(grouped))
    fault_tests = {
        function.partition("(")[0]
        for source in (ROOT / "tests").glob("*/test_*.py")
        for function in re.split(r"\n(?:async )?def ", source.read_text())[1:]
        if function.startswith("test_") and re.search(r"^ +reliability\.seen\($", function, re.MULTILINE)
    }
    assert fault_tests - set(grouped) == set()
    every = "".join(source.read_text() for source in (ROOT / "tests").glob("*/test_*.py"))
    assert [test for test in grouped if f"def {test}(" not in every] == []


def test_a_row_of_an_unknown_test_is_refused() -> None:
    with pytest.raises(ValueError, match="no group for test_other"):
        reliability.page([["a fault", "a promise", "so", "test_other"]])
