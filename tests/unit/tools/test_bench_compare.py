"""The driver of a comparison, in a repository with a fake benchmark: turns, statuses, and nothing left behind."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tools.bench import compare
from tests.tools.bench.worktree import IMAGES_DIR, Tree

ROOT = Path(__file__).parents[3]

_FAKE = """
import json, os, sys, time
from pathlib import Path
from sys import argv
assert argv[1:] == ["recover", "--rounds", "1", "--json"], argv  # all that the oldest commit takes
tree = Path.cwd().resolve()
assert Path(__file__).resolve().is_relative_to(tree)
log = Path(os.environ["FAKE_LOG"])
with log.open("a") as file:
    file.write(json.dumps([str(tree), os.environ.get("SANDBOXD_IMAGES__IMAGES_DIR", "")]) + "\\n")
turn = len(log.read_text().splitlines())
SPEED = 1.0
HOW = "works"
if HOW == "fails":
    print("no such sandbox", file=sys.stderr)
    sys.exit(3)
if HOW == "hangs":
    try:
        print("hanging", file=sys.stderr)
        time.sleep(60)
    finally:
        with log.open("a") as file:
            file.write(json.dumps(["cleaned", tree.exists()]) + "\\n")
if HOW == "mumbles":
    print("42")
    sys.exit(0)
figures = {"adopted": 50, "lost": 0, "ready_s": SPEED + turn / 1000, "all_ready_s": 2.0}
print(json.dumps({"bench": "recover", "machine": {"cores": 2}, "figures": figures}))
"""


class Repository:
    """A git repository with a fake benchmark; its first commit, tagged `before`, has it where 0.1.0 had it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "repository"
        self.temporary = directory / "temporary"
        self.temporary.mkdir()
        self.log = directory / "log"
        self.package = Path("tests") / "bench"
        (self.directory / self.package).mkdir(parents=True)
        self.git("init", "--quiet", "--initial-branch=main")
        self.write()
        self.commit()
        self.git("tag", "before")
        self.package = Path("tests") / "tools" / "bench"
        (self.directory / "tests" / "tools").mkdir()
        self.git("mv", "tests/bench", str(self.package))

    def git(self, *words: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", *who, "-C", str(self.directory), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def write(self, speed: float = 1.0, how: str = "works") -> None:
        for package in (self.package, *self.package.parents[:-1]):
            (self.directory / package / "__init__.py").touch()
        text = _FAKE.replace("SPEED = 1.0", f"SPEED = {speed}").replace('HOW = "works"', f'HOW = "{how}"')
        (self.directory / self.package / "__main__.py").write_text(text)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "-m", "a commit")

    def turns(self) -> list[list[str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def assert_clean(self) -> None:
        """No worktree is left, neither for git nor on disk."""
        assert len(self.git("worktree", "list").splitlines()) == 1
        assert list(self.temporary.iterdir()) == []


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    made = Repository(tmp_path)
    monkeypatch.setenv("FAKE_LOG", str(made.log))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # must not reach the sides: they would run the real benchmarks
    monkeypatch.setattr("tempfile.tempdir", str(made.temporary))
    return made


def _link_python(tree: Tree) -> None:
    tree.python.parent.mkdir(parents=True)
    tree.python.symlink_to(sys.executable)


def _run(repository: Repository, **options: object) -> int:
    given = {"names": ["recover"], "compare": "before", "rounds": 5, "json": True, "max_ratio": None}
    chosen = argparse.Namespace(**{**given, "rounds_per_turn": 1, **options})
    return compare.main(chosen, repository.directory, _link_python)


def test_both_trees_run_in_turns(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    repository.write(speed=1.2)  # not committed: this tree is measured as it is
    assert _run(repository, max_ratio=1.05) == 1
    turns = repository.turns()
    new = str(repository.directory.resolve())
    assert [tree == new for tree, _ in turns] == [False, True] * 5
    assert len({tree for tree, _ in turns}) == 2
    assert all(bool(images) is (tree != new) for tree, images in turns if IMAGES_DIR not in os.environ)
    answer = json.loads(capsys.readouterr().out)
    assert answer["new"].endswith("-dirty")
    assert answer["old"] == repository.git("rev-parse", "before")[:12]
    figures = {one["figure"]: one for one in answer["figures"]}
    assert set(figures) == {"adopted", "lost", "ready_s", "all_ready_s"}
    ready = figures["ready_s"]
    assert len(ready["old"]) == len(ready["new"]) == 5
    assert ready["ratio"] == pytest.approx(statistics.median(ready["new"]) / statistics.median(ready["old"]))
    assert ready["p"] == pytest.approx(2 / 252)
    assert [one["figure"] for one in answer["figures"] if one["worse"]] == ["ready_s"]
    assert "recover ready_s" in answer["verdict"]
    repository.assert_clean()


def test_the_status_is_that_of_the_verdict(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    repository.write(speed=1.2)
    assert _run(repository) == 0  # no limit is given
    assert _run(repository, max_ratio=1.5) == 0
    repository.write(speed=0.25)  # of another length: bytecode is taken for stale by size and second of its source
    assert _run(repository, max_ratio=1.05, json=False) == 0
    said = capsys.readouterr().out
    assert re.search(r"ready_s.*\bbetter\b", said)
    assert "verdict: no figure is worse by more than 1.05 with p < 0.05" in said
    repository.assert_clean()


@pytest.mark.parametrize(("how", "said"), [("fails", "status 3: no such sandbox"), ("mumbles", "printed no figures")])
def test_a_side_that_cannot_be_measured(
    repository: Repository, capsys: pytest.CaptureFixture[str], how: str, said: str
) -> None:
    repository.write(how=how)
    assert _run(repository) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "of the new tree" in captured.err
    assert captured.out == ""
    repository.assert_clean()


def test_a_revision_that_is_none(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    for revision in ("no-such-commit", "--help"):
        assert _run(repository, compare=revision) == 2
        assert f"there is no commit '{revision}'" in capsys.readouterr().err
    repository.assert_clean()


def test_a_tree_that_cannot_be_made_ready(repository: Repository) -> None:
    def broken(tree: Tree) -> None:
        raise RuntimeError(tree.commit)

    options = argparse.Namespace(
        names=["recover"], compare="before", rounds=1, json=True, max_ratio=None, rounds_per_turn=1
    )
    with pytest.raises(RuntimeError):
        compare.main(options, repository.directory, broken)
    repository.assert_clean()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_the_benchmark_clean_up_first(repository: Repository, number: signal.Signals) -> None:
    repository.write(how="hangs")
    repository.commit()
    repository.git("tag", "hangs")
    program = (
        "import argparse, sys, tempfile\n"
        "from pathlib import Path\n"
        "from tests.tools.bench import compare\n"
        "from tests.unit.tools.test_bench_compare import _link_python\n"
        f"tempfile.tempdir = {str(repository.temporary)!r}\n"
        "options = argparse.Namespace(names=['recover'], compare='hangs', rounds=1, json=True, max_ratio=None,\n"
        "                             rounds_per_turn=1)\n"
        f"sys.exit(compare.main(options, Path({str(repository.directory)!r}), _link_python))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not (repository.log.exists() and repository.turns()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(repository.git("worktree", "list").splitlines()) == 2
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, said
    assert repository.turns()[1:] == [["cleaned", True]]
    repository.assert_clean()
