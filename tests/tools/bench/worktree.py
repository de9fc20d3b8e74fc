"""Another commit of this repository, made ready to run: a git worktree with an environment and an image of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.tools.bench.command import CompareError, run

IMAGES_DIR = "SANDBOXD_IMAGES__IMAGES_DIR"
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What would lead a program of one tree to the code or the packages of another.
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")


@dataclass(frozen=True, slots=True)
class Tree:
    """A checkout that can be run. :param commit: its id, or how it differs from it. :param environment: of programs."""

    directory: Path
    commit: str
    python: Path
    environment: Mapping[str, str]


def environment() -> dict[str, str]:
    """Return this process's environment without what belongs to this tree."""
    return {name: value for name, value in os.environ.items() if name not in _FOREIGN}


def here(repository: Path) -> Tree:
    """Return the tree that this program runs from, changes that are not committed included."""
    commit = run(["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], repository).stdout
    return Tree(repository, commit, Path(sys.executable), environment())


@contextmanager
def worktree(repository: Path, revision: str) -> Iterator[Tree]:
    """Check a revision out below a temporary directory, which is gone in the end, whatever ends it.

    :raises CompareError: there is no such revision, or it cannot be checked out.
    """
    try:
        commit = run(["git", "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}"], repository).stdout
    except CompareError as error:
        raise CompareError(f"there is no commit {revision!r}: {error}") from error
    above = Path(tempfile.mkdtemp(prefix="sandboxd-compare-"))
    above.chmod(0o755)  # programs of the tree become users who have to read it
    directory = above / "tree"
    try:
        # Hooks of the developer's are for the developer's own checkouts.
        add = ["git", "-c", "core.hooksPath=/dev/null", "worktree", "add", "--quiet", "--detach"]
        run([*add, str(directory), commit], repository)
        env = {**environment(), IMAGES_DIR: str(above / "images")}
        yield Tree(directory, commit[:12], directory / ".venv" / "bin" / "python", env)
    finally:
        with _undisturbed():
            remove = ["git", "worktree", "remove", "--force", "--force", str(directory)]
            subprocess.run(remove, cwd=repository, check=False, capture_output=True)
            shutil.rmtree(above, ignore_errors=True)
            subprocess.run(["git", "worktree", "prune"], cwd=repository, check=False, capture_output=True)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore signals that end a program; git, which is started meanwhile, ignores them as well."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn the signals that end a program into KeyboardInterrupt, so that all that was acquired is released."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare(tree: Tree) -> None:
    """Make a fresh worktree runnable: packages as it has them locked, generated protos, its image `minimal`.

    :raises CompareError: a step fails.
    """
    if shutil.which("uv") is None:
        raise CompareError("uv is not in PATH: run this as `just bench --compare ...`")
    base = Path(sys.base_prefix) / "bin" / "python3"
    env = {"UV_PYTHON": str(base), "UV_PYTHON_DOWNLOADS": "never", **tree.environment}
    run(["uv", "sync", "--frozen", "--quiet", "--compile-bytecode"], tree.directory, env)
    run([tree.python, "hatch_build.py"], tree.directory, tree.environment)
    run([tree.python, "-m", "rootfs", "build", "minimal"], tree.directory, tree.environment)
    compile_code(tree)


def compile_code(tree: Tree) -> None:
    """Compile all modules now, or the first round of a fresh tree would pay for it."""
    with contextlib.suppress(CompareError):  # a file that does not compile is not one that a benchmark imports
        run([tree.python, "-m", "compileall", "-q", "-x", r"/(\.venv|\.git|node_modules)/", "."], tree.directory)
