"""The identity of the egress process's code: what changes it, and that all code is in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from agent.common.config.egress import EgressSettings
from agent.common.errors import HostError
from agent.egress import code_identity
from agent.egress.code_identity import distributions, import_closure, own_identity
from agent.egress.launch import identity_of

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).parents[3]
PROGRAM = "agent.egress.__main__"
# Loads all that the process loads before it gives up its privileges.
LOADED = """
import json, sys
from agent.egress import __main__
__main__._load_all()
files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
print(json.dumps({name: file for name, file in files.items() if file}))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the agent's code."""
    shutil.copytree(ROOT / "agent", tmp_path / "agent", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def identity(root: Path) -> str:
    return code_identity.code_identity(PROGRAM, root)


@pytest.mark.parametrize(
    "module",
    [
        "agent.common.policy.rules",
        "agent.common.ca",
        "agent.common.errors",
        "agent.common.config.settings",
        "agent.egress.tcp.proxy",
        "agent.common.policy",
    ],
)
def test_one_byte_of_a_loaded_module_changes_it(tree: Path, module: str) -> None:
    before = identity(tree)
    path = code_identity._source_path(module, tree)
    assert path is not None
    path.write_bytes(path.read_bytes() + b"\n")
    assert identity(tree) != before
    path.write_bytes(path.read_bytes()[:-1])
    assert identity(tree) == before


def test_times_and_code_of_other_programs_do_not_change_it(tree: Path) -> None:
    before = identity(tree)
    for path in tree.rglob("*.py"):
        os.utime(path, (1, 1))
    for module in (
        "agent/daemon/sandbox/service.py",
        "agent/gateway/app.py",
        "agent/daemon/network/egress/supervisor.py",
    ):
        path = tree / module
        path.write_bytes(path.read_bytes() + b"\n")
    assert identity(tree) == before == own_identity()


def test_a_third_party_package_beside_the_code_counts_by_its_version(tree: Path) -> None:
    """As in the Debian package, whose site-packages has all of them."""
    before = identity(tree)
    beside = tree / "h2"
    beside.mkdir()
    (beside / "__init__.py").touch()
    (beside / "connection.py").write_text("from . import events\nfrom .config import H2Configuration\n")
    assert identity(tree) == before


def test_moved_module_changes_it(tree: Path) -> None:
    before = identity(tree)
    inner = tree / "agent" / "common" / "tls"
    inner.mkdir()
    (inner / "__init__.py").touch()
    (tree / "agent/common/ca.py").rename(inner / "ca.py")
    for path in tree.rglob("*.py"):
        path.write_text(path.read_text().replace("from agent.common.ca import", "from agent.common.tls.ca import"))
    assert "agent.common.tls.ca" in import_closure(PROGRAM, tree)[0]
    assert identity(tree) != before


def test_version_of_a_loaded_package_changes_it(monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    before = identity(tree)
    real = code_identity.distributions
    for name in ("h2", "h11", "hpack", "dnspython", "cryptography", "idna"):
        changed = {**real(import_closure(PROGRAM, tree)[1]), name: "0"}
        monkeypatch.setattr(code_identity, "distributions", lambda packages, changed=changed: changed)
        assert identity(tree) != before, name


def test_closure_has_all_that_the_process_loads() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded: dict[str, str] = json.loads(done.stdout)
    modules, packages = import_closure(PROGRAM, ROOT)
    ours = {name for name, file in loaded.items() if Path(file).is_relative_to(ROOT / "agent")}
    assert ours == set(modules)
    for module, source in modules.items():
        assert Path(loaded[module]).read_bytes() == source
    foreign = {name.partition(".")[0] for name, file in loaded.items() if "site-packages" in file}
    files = "\n".join(file for name in distributions(packages) for file in _files(name))
    # The finder of editable installs, and a module that cffi has at the top, are no packages.
    for package in foreign - {"_distutils_hack", "__editable___"}:
        assert f"{package}/" in files or f"{package}." in files, package


def _files(distribution: str) -> list[str]:
    return [str(file) for file in metadata.files(distribution) or ()]


def test_another_process_computes_the_same_value() -> None:
    code = "from agent.egress.launch import *; print(identity_of(EgressSettings()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == identity_of(EgressSettings())


def test_checkout_that_is_not_installed_has_an_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    version = own_identity().partition("-")[0]
    assert version == metadata.version("sandboxd")
    monkeypatch.setattr(code_identity, "_DISTRIBUTION", "no-such-distribution")
    assert identity(ROOT) == own_identity().replace(version, "0", 1)


def test_settings_change_the_identity() -> None:
    known = {
        identity_of(EgressSettings()),
        identity_of(EgressSettings(uplink="out")),
        identity_of(EgressSettings(uid=7)),
    }
    assert len(known) == 3


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a\n", {"a"}),
        ("import a.b as c, d\n", {"a.b", "d"}),
        ("from agent import (\n    b,  # not (c)\n    d as e,\n)\n", {"agent", "agent.b", "agent.d"}),
        ("from a import b\n", {"a"}),  # not the project's own: b may be anything
        ("def f():\n    from a.b import c  # why\n", {"a.b"}),
        ('x = importlib.import_module("a.b")\n', {"a.b"}),
        ("reimport a\nfrom . import a\n# import a\n", {"."}),
    ],
)
def test_imports_of_a_source(source: str, expected: set[str], tmp_path: Path) -> None:
    for package in ("agent", "a"):
        (tmp_path / package).mkdir()
        for name in ("b", "d"):
            (tmp_path / package / f"{name}.py").touch()
    assert set(code_identity._imports(source, tmp_path)) == expected


def test_code_that_cannot_be_read_is_said(tree: Path) -> None:
    (tree / "agent/common/ca.py").write_bytes(b"\xff")
    with pytest.raises(HostError, match="cannot read the egress process's code") as caught:
        identity(tree)
    assert caught.value.reason == "EGRESS_NOT_STARTED"
