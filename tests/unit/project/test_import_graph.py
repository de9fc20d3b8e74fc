"""No circles of imports, and no code that spawns processes in the one that reads hostile bytes."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("agent", "guest", "rootfs")
EGRESS = "agent.egress"
SPAWNING_MODULES = {"subprocess", "multiprocessing", "pty", "concurrent.futures.process"}
# Of any object: asyncio, an event loop, os, or the C library by ctypes.
SPAWNING_NAMES = {
    "create_subprocess_exec", "create_subprocess_shell", "subprocess_exec", "subprocess_shell", "ProcessPoolExecutor",
    "fork", "forkpty", "vfork", "posix_spawn", "posix_spawnp", "fork_exec",
}  # fmt: skip
# Only of os: `system` and `popen` are words of other libraries, too. The exec functions end in l, v, e and p.
SPAWNING_OF_OS = ("exec", "spawn", "popen", "system")


@functools.cache
def _graph(*, with_type_checking: bool = True) -> grimp.ImportGraph:
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=not with_type_checking, cache_dir=None)
    assert {"agent.egress.__main__", "guest.init", "rootfs.build"} <= graph.modules
    return graph


def circles(graph: grimp.ImportGraph) -> list[str]:
    """Return, for each set of modules that import each other, one circle in it: "a -> b -> a (of 2 modules)"."""
    imports = {module: graph.find_upstream_modules(module) for module in graph.modules}
    lines, seen = [], set[str]()
    for module in sorted(graph.modules):
        together = {other for other in imports[module] if module in imports[other]}
        if module in seen or not together:
            continue
        seen |= together
        into = min(together & graph.find_modules_directly_imported_by(module))
        way = graph.find_shortest_chain(importer=into, imported=module)
        assert way is not None
        lines.append(f"{' -> '.join((module, *way))} (of {len(together | {module})} modules)")
    return lines


def spawning_code(source: str) -> list[str]:
    """Return what in a module's source starts processes: "line 3: subprocess"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name in SPAWNING_MODULES]
        elif isinstance(node, ast.ImportFrom):
            whole = node.module or ""
            words = [whole, *(f"{whole}.{alias.name}" for alias in node.names)]
            names = [word for word in words if word in SPAWNING_MODULES or _is_spawning(*word.rpartition(".")[::2])]
        elif isinstance(node, ast.Attribute):
            base = node.value.id if isinstance(node.value, ast.Name) else ""
            names = [node.attr] if _is_spawning(base, node.attr) else []
        else:
            continue
        found += [f"line {node.lineno}: {name}" for name in names]
    return found


def _is_spawning(base: str, name: str) -> bool:
    return name in SPAWNING_NAMES or (base == "os" and name.startswith(SPAWNING_OF_OS))


def _way_to(graph: grimp.ImportGraph, module: str) -> str:
    """Return how the package reaches a module: "agent.egress.a -> agent.b"."""
    if module == EGRESS or module.startswith(f"{EGRESS}."):
        return module
    chains = graph.find_shortest_chains(importer=EGRESS, imported=module, as_packages=True)
    ways = sorted((tuple(chain) for chain in chains), key=lambda way: (len(way), way))
    return " -> ".join(ways[0])


def test_no_modules_import_each_other_in_a_circle() -> None:
    found = circles(_graph())
    assert found == [], "circles of imports:\n" + "\n".join(found)


def test_the_egress_process_loads_no_code_that_spawns() -> None:
    graph = _graph(with_type_checking=False)
    inside = {EGRESS} | graph.find_descendants(EGRESS)
    found = []
    for module in sorted(inside.union(*(graph.find_upstream_modules(each) for each in inside))):
        path = ROOT.joinpath(*module.split("."))
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for spawning in spawning_code(source.read_text()):
            found.append(f"{_way_to(graph, module)}, {spawning}")
    assert found == [], "agent.egress loads code that spawns processes:\n" + "\n".join(found)


def test_circles_are_found_and_listed_once() -> None:
    graph = grimp.ImportGraph()
    for importer, imported in (("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "f"), ("f", "e"), ("g", "a")):
        graph.add_import(importer=importer, imported=imported)
    assert circles(graph) == ["a -> b -> c -> a (of 3 modules)", "e -> f -> e (of 2 modules)"]


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "import multiprocessing as mp",
        "from subprocess import Popen",
        "from concurrent.futures import ProcessPoolExecutor",
        "from os import posix_spawn",
        "import os\nos.fork()",
        "import os\nos.execv('/bin/true', [])",
        "import os\nos.system('true')",
        "import asyncio\nasyncio.create_subprocess_exec('true')",
        "from asyncio import create_subprocess_shell",
        "loop.subprocess_exec(object, 'true')",
        "import ctypes\nctypes.CDLL(None).vfork()",
        "def later():\n    import pty",
    ],
)
def test_code_that_spawns_is_recognized(source: str) -> None:
    assert spawning_code(source) != []


def test_other_code_does_not_spawn() -> None:
    assert spawning_code("import os, platform\nos.getpid()\nplatform.system()\nos.environ['exec']") == []
