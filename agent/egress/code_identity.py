"""Digest of all code that a program loads: own modules by content, third-party packages by version.

The imports are read from the sources: a process that has just started has not loaded all modules yet, and the agent
loads fewer of them than the egress process. No module is imported for it, and no list is kept by hand.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from agent.common.errors import HostError

_ROOT = Path(__file__).parents[__name__.count(".")]
_PROGRAM = f"{__name__.rpartition('.')[0]}.__main__"
# A regular expression, since `ast.parse` takes 40 ms for all modules and fails at random in Python before 3.11.5
# (python/cpython#106905). Prose of the same form is harmless: its words are not names of modules.
_IMPORT = re.compile(
    r"""^[ \t]*(?:from[ ]+([\w.]+)[ ]+import[ ]+(\((?:[^)#]|\#[^\n]*)*\)|[^\n\#]+)|import[ ]+([^\n\#;]+))
    |import_module\("([\w.]+)"\)""",
    re.MULTILINE | re.VERBOSE,
)
_COMMENT = re.compile(r"#[^\n]*")
_NAME = re.compile(r"\w+")
_DISTRIBUTION = "sandboxd"
_OWN_PACKAGES = frozenset({"agent", "guest", "rootfs", "sandboxd"})
_OF_AN_EXTRA = re.compile(r";.*\bextra\b")
_REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+")


@functools.cache
def own_identity() -> str:
    """Return the identity of the egress process's code; the first call reads about 50 files.

    Cached, so that it remains the running code's identity if another version is installed meanwhile.

    :raises HostError: a source file cannot be read.
    """
    return code_identity(_PROGRAM, _ROOT)


def code_identity(program: str, root: Path) -> str:
    """Return "<project version>-<digest>" of the module `program` and of its direct and indirect imports.

    :param root: directory of the project's packages.
    :raises HostError: a source file cannot be read.
    """
    try:
        modules, packages = import_closure(program, root)
    except (OSError, UnicodeDecodeError) as error:
        raise HostError(f"cannot read the egress process's code: {error}", reason="EGRESS_NOT_STARTED") from error
    digest = hashlib.sha256(platform.python_version().encode())
    for name, source in sorted(modules.items()):
        digest.update(f"\n{name} {len(source)}\n".encode() + source)
    for name, version in sorted(distributions(packages).items()):
        digest.update(f"\n{name}=={version}".encode())
    return f"{_own_version()}-{digest.hexdigest()[:32]}"


def _own_version() -> str:
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:  # run from a checkout without installation
        return "0"


def import_closure(program: str, root: Path) -> tuple[dict[str, bytes], set[str]]:
    """Return sources of the modules below `root` that `program` imports, by name, and names of third-party packages.

    The standard library is left out: the version of Python identifies it.

    :raises OSError: a source file cannot be read.
    :raises UnicodeDecodeError: a source file is not UTF-8.
    """
    modules: dict[str, bytes] = {}
    packages: set[str] = set()
    waiting = [program]
    while waiting:
        name = waiting.pop()
        if name in modules:
            continue
        path = _source_path(name, root)
        if path is None:
            packages.add(name.partition(".")[0])
            continue
        modules[name] = path.read_bytes()
        waiting += _imports(modules[name].decode(), root)
        if "." in name:
            waiting.append(name.rpartition(".")[0])  # importing a module runs its package's `__init__` first
    return modules, packages - sys.stdlib_module_names


def _source_path(module: str, root: Path) -> Path | None:
    if module.partition(".")[0] not in _OWN_PACKAGES:
        return None  # an installed third-party package may be beside the project's own
    place = root.joinpath(*module.split("."))
    for path in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
        if path.is_file():
            return path
    return None


def _imports(source: str, root: Path) -> Iterator[str]:
    """Yield the absolute names of the modules that a source imports, at top level or inside functions."""
    for module, names, modules, dynamic in _IMPORT.findall(source):
        if module:
            yield module
            inner = (f"{module}.{name}" for name in _NAME.findall(_COMMENT.sub("", names)))
            yield from (name for name in inner if _source_path(name, root) is not None)
        yield from (words.split()[0] for words in modules.split(",") if words.strip())
        if dynamic:
            yield dynamic


def distributions(packages: set[str]) -> dict[str, str]:
    """Return name and version of the installed distributions of these packages, and of their requirements."""
    versions: dict[str, str] = {}
    waiting = _owners(packages)
    while waiting:
        name = _normalised(waiting.pop())
        if name in versions:
            continue
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # required for another platform or Python
        versions[name] = found.version
        for requirement in found.requires or ():
            if not _OF_AN_EXTRA.search(requirement) and (words := _REQUIREMENT.match(requirement)):
                waiting.append(words[0])
    return versions


def _owners(packages: set[str]) -> list[str]:
    """Return the names of the distributions of these packages; most have the name of their package."""
    owners, others = [], set()
    for package in packages:
        try:
            owners.append(metadata.distribution(package).metadata["Name"])
        except metadata.PackageNotFoundError:
            others.add(package)
    if others:
        # `metadata.packages_distributions` does the same in 70 ms.
        for found in metadata.distributions():
            record = found.read_text("RECORD") or ""
            if any(f"\n{package}{end}" in f"\n{record}" for package in others for end in ("/", ".py,")):
                owners.append(found.metadata["Name"])
    return owners


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
