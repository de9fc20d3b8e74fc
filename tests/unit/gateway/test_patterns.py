"""JavaScript regular expressions and globs."""

from __future__ import annotations

import contextlib
import posixpath
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.gateway.errors import CallError
from agent.gateway.methods.patterns import from_glob, from_javascript


@pytest.mark.parametrize(
    ("source", "flags", "yes", "no"),
    [
        (r"\.txt$", "", ["a.txt"], ["a.txt\n", "a.txtx"]),
        (r"^a", "m", ["b\na"], ["b"]),
        ("A", "i", ["a", "A"], ["b"]),
        (r"^\d+$", "", ["123"], ["١٢٣", ""]),
        (r"[\w-]+\/x", "", ["a-b/x"], ["/x"]),
        ("[^]", "", ["\n"], [""]),
        ("a[]b|c", "", ["c"], ["ab"]),
        ("[[]", "", ["["], ["]"]),
        (r"(?<year>\d{4})-\k<year>", "", ["2020-2020"], ["2020-2021"]),
        ("(?:a|b){2}(?!c)", "u", ["ab"], ["abc"]),
        ("a.c", "s", ["a\nc"], ["ac"]),
    ],
)
def test_javascript_patterns(source: str, flags: str, yes: list[str], no: list[str]) -> None:
    matches = from_javascript(source, flags)
    assert [text for text in yes if not matches(text)] == []
    assert [text for text in no if matches(text)] == []


def test_patterns_that_are_none_or_take_for_ever() -> None:
    for source, flags in (("(", ""), ("a", "q"), ("[z-a]", ""), (r"\cA", "")):
        with pytest.raises(CallError) as caught:
            from_javascript(source, flags)
        assert caught.value.kind == "SyntaxError"
    hostile = from_javascript("^(a|a|aa)+$", "")
    begun = time.monotonic()
    with pytest.raises(CallError, match="too long"):
        hostile("a" * 60 + "b")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("*.txt", ["a.txt", ".txt"], ["a/b.txt", "a.txtx"]),
        ("a?c", ["abc"], ["ac", "a/c"]),
        ("**/x", ["x", "a/x", "a/b/x"], ["ax"]),
        ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["ab"]),
        ("{a,b}*.{md,txt}", ["a1.md", "b.txt"], ["c.md"]),
        ("[a-c]x", ["ax"], ["dx", "/x"]),
        ("[!a-c]x", ["dx"], ["ax", "/x"]),
        ("[[:digit:]]", ["5"], ["a"]),
        ("[]]", ["]"], ["["]),
        ("@(a|b)c", ["ac", "bc"], ["c", "abc"]),
        ("+(a|b)", ["abab"], [""]),
        ("?(a)b", ["b", "ab"], ["aab"]),
        ("!(a)b", ["bb", "b"], ["ab"]),
        (r"\*", ["*"], ["a"]),
        ("a{b", ["a{b"], ["ab"]),
        ("/abs/*", ["/abs/x"], ["abs/x"]),
    ],
)
def test_globs(glob: str, yes: list[str], no: list[str]) -> None:
    matches = from_glob(glob)
    assert [text for text in yes if not matches(text)] == []
    assert [text for text in no if matches(text)] == []


@settings(max_examples=300, deadline=None)
@given(st.text("ab*?[]{}(),|!+@\\/.-^", max_size=12))
def test_any_glob_is_a_pattern_or_a_failure(glob: str) -> None:
    with contextlib.suppress(CallError):
        from_glob(glob)(posixpath.normpath("a/b"))
