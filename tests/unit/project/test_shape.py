"""Classes and functions stay short enough to read, and the tool that measures them counts right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tools import shape

ROOT = Path(__file__).parents[3]
SOURCE = '''"""A module."""

import functools


class Outer:
    """A class."""

    @functools.cache
    def method(self) -> int:
        def nested() -> int:
            return 1

        return nested()


async def function() -> None:
    pass
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/module.py").write_text(SOURCE)
    return tmp_path / "package"


def _long(kind: str, lines: int) -> str:
    return f"{kind}:\n" + "    x = 1\n" * (lines - 1)


def test_no_class_or_function_is_too_long() -> None:
    assert shape.oversized(shape.measure([ROOT / package for package in shape.PACKAGES])) == []


def test_lines_are_counted_from_the_definition_to_its_last_statement(package: Path) -> None:
    sizes = {each.name.rpartition(" ")[2]: each.lines for each in shape.measure([package])}
    module = str(package / "module.py")
    assert sizes == {module: 18, "Outer": 9, "method": 5, "nested": 2, "function": 2}


def test_figures_of_each_package_and_of_all(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (package / "other.py").write_text("".join(f"def f{n}():\n" + "    pass\n" * n for n in range(1, 8)))
    assert shape.main(["--json", str(package), str(package / "module.py")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert list(summary) == [str(package), str(package / "module.py"), "all"]
    assert summary[str(package)]["function"] == {"count": 10, "median": 4.5, "p90": 7, "max": 8}
    assert summary["all"]["module"]["count"] == 3
    assert shape.main([str(package)]) == 0
    assert "function" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "status"),
    [
        (_long("def f()", 60), 0),
        (_long("def f()", 61), 1),
        (_long("async def f()", 61), 1),
        (_long("class C", 300), 0),
        (_long("class C", 301), 1),
        ("x = 1\n" * 1000, 0),
    ],
)
def test_the_check_fails_above_its_limits(
    package: Path, capsys: pytest.CaptureFixture[str], source: str, status: int
) -> None:
    (package / "long.py").write_text(source)
    assert shape.main(["--check", str(package)]) == status
    assert (f"{package}/long.py:1 " in capsys.readouterr().out) == (status == 1)


def test_a_package_that_is_not_there_is_an_error() -> None:
    with pytest.raises(SystemExit) as caught:
        shape.main(["--check", "no-such-package"])
    assert caught.value.code == 2
