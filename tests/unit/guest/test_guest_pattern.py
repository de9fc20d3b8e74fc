"""Glob patterns of the guest, against the shell's idea of them and against hostile ones."""

from __future__ import annotations

import fnmatch
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest.pattern import Pattern
from guest.wire import CallError

steady = settings(derandomize=True, database=None, deadline=None, max_examples=300)
letters = st.text("ab.-]![^*?&|~\\\n", max_size=8)


def matches(pattern: str, path: str, *, hidden: bool = True) -> bool:
    return Pattern(pattern, hidden=hidden).matches(path)


@steady
@given(letters.filter(lambda text: text and text not in (".", "..", "**")), letters.filter(bool))
def test_one_name_matches_as_in_fnmatch(pattern: str, name: str) -> None:
    try:
        ours = Pattern(pattern, hidden=True).matches(name)
    except CallError:
        return  # a range that runs backwards
    assert ours == fnmatch.fnmatchcase(name, pattern)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*.py", "a.py", True),
        ("*.py", "a/b.py", False),
        ("*", "two\nlines", True),
        ("?", "\n", True),
        ("**", "a/b/c", True),
        ("**", "", True),
        ("**/*.py", "x.py", True),
        ("a/**/z", "a/z", True),
        ("a/**/z", "a/b/c/z", True),
        ("a/**/z", "a/b/c", False),
        ("**/b/**", "a/b", True),
        ("a**b", "axxb", True),
        ("[a-c]x", "bx", True),
        ("[!a-c]x", "bx", False),
        ("[]a]", "]", True),
        ("[!]a]", "]", False),
        ("[!]a]", "b", True),
        ("[a-]", "-", True),
        ("[--0]", ".", True),
        ("[", "[", True),
        ("[a", "[a", True),
        ("[\\\\]", "\\", True),
        ("a.b", "axb", False),
        ("./a//b/", "a/b", True),
        ("caf\udce9*", "caf\udce9.txt", True),
    ],
)
def test_examples(pattern: str, path: str, expected: bool) -> None:
    assert matches(pattern, path) is expected


@pytest.mark.parametrize(
    ("pattern", "path"), [("*", ".a"), ("?a", ".a"), ("[.]a", ".a"), ("**", ".a"), ("**/x", ".a/x"), ("a/*", "a/.b")]
)
def test_hidden_names_need_a_dot_or_the_option(pattern: str, path: str) -> None:
    assert not matches(pattern, path, hidden=False)
    assert matches(pattern, path, hidden=True)


def test_a_dot_in_the_pattern_finds_hidden_names() -> None:
    assert matches(".*", ".a", hidden=False)
    assert matches("a/.b", "a/.b", hidden=False)


@pytest.mark.parametrize(
    ("pattern", "fixed"), [("a/b/*.py", "a/b"), ("a/b", "a"), ("a", ""), ("*", ""), ("a/[b]/c", "a"), ("a/**", "a")]
)
def test_the_search_starts_behind_the_fixed_part(pattern: str, fixed: str) -> None:
    assert Pattern(pattern, hidden=False).fixed == fixed


@pytest.mark.parametrize("pattern", ["", "a\0", "x" * 4096, "*" * 65, "..", "a/../b", "[z-a]"])
def test_patterns_that_are_refused(pattern: str) -> None:
    with pytest.raises(CallError) as caught:
        Pattern(pattern, hidden=True)
    assert caught.value.code == "INVALID"


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("*a" * 60 + "b", "a" * 255),
        ("*" * 64 + "b", "a" * 255),
        ("*a?" * 40 + "b", "a" * 255),
        ("*[ab]" * 40 + "c", "ab" * 127),
        ("**/" * 30 + "x", "/".join("a" * 250)),
        ("**/a/" * 12 + "b", "/".join("a" * 250)),
    ],
)
def test_no_pattern_is_slow(pattern: str, path: str) -> None:
    start = time.perf_counter()
    assert not matches(pattern, path)
    assert time.perf_counter() - start < 1
