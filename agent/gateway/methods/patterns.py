"""Compile patterns of clients, JavaScript regular expressions and globs, with the package `regex`.

Each search has a timeout, because a hostile pattern can backtrack for ever.

Globs are those of Deno's @std/path (globToRegExp), and wcmatch 12 cannot replace this module: a differential test
found 1 to 3 % of random pairs that differ. In wcmatch, `a/` does not match "a", `*` matches neither "." nor "", `{}`
is literal, and a trailing backslash matches the empty string. It has no timeout for a match either.
"""

from __future__ import annotations

from collections.abc import Callable

import regex

from agent.gateway.errors import CallError

_TIMEOUT_S = 0.05
_FLAGS = {"i": regex.IGNORECASE, "m": regex.MULTILINE, "s": regex.DOTALL, "u": 0, "v": 0, "g": 0, "y": 0, "d": 0}
_NAMED = regex.compile(r"\\k<(\w+)>")
_ASCII_CLASSES = {"d": "0-9", "w": "A-Za-z0-9_"}

Matcher = Callable[[str], bool]


def from_javascript(source: str, flags: str) -> Matcher:
    """Return a function that searches a text for a JavaScript RegExp.

    :raises CallError: the pattern or a flag is invalid or unsupported; from the function, the search timed out.
    """
    bits = regex.V1
    for flag in flags:
        if flag not in _FLAGS:
            raise CallError("SyntaxError", f"unknown flag {flag!r} of a regular expression")
        bits |= _FLAGS[flag]
    return _compile(_translate(source, multiline="m" in flags), bits, source)


def _compile(pattern: str, bits: int, shown: str) -> Matcher:
    try:
        compiled = regex.compile(pattern, bits)
    except (regex.error, RecursionError, OverflowError) as error:
        raise CallError("SyntaxError", f"invalid pattern {shown[:200]!r}: {error}") from None

    def matches(text: str) -> bool:
        try:
            return compiled.search(text, timeout=_TIMEOUT_S) is not None
        except TimeoutError:
            raise CallError("Error", f"the pattern {shown[:200]!r} takes too long") from None

    return matches


def _translate(source: str, *, multiline: bool) -> str:
    """Translate JavaScript syntax that `regex` does not have, or has with another meaning."""
    out = []
    in_class = False
    at = 0
    while at < len(source):
        character = source[at]
        if (reference := _NAMED.match(source, at)) and not in_class:
            out.append(f"(?P={reference[1]})")
            at = reference.end()
            continue
        if character == "\\" and at + 1 < len(source):
            out.append(_translate_escape(source[at + 1], in_class=in_class))
            at += 2
            continue
        if in_class:
            in_class = character != "]"
            out.append("\\[" if character == "[" else "\\" + character if character in "&~|" else character)
        elif source.startswith("[^]", at) or source.startswith("[]", at):
            out.append("(?s:.)" if source[at + 1] == "^" else "(?!)")
            at += 3 if source[at + 1] == "^" else 2
            continue
        elif character == "[":
            in_class = True
            out.append(character)
            if source.startswith("[^", at):
                out.append("^")
                at += 1
        elif character == "$" and not multiline:
            out.append(r"\Z")  # `$` of `regex` also matches before a last line break
        else:
            out.append(character)
        at += 1
    return "".join(out)


def _translate_escape(character: str, *, in_class: bool) -> str:
    if character in _ASCII_CLASSES:
        return _ASCII_CLASSES[character] if in_class else f"[{_ASCII_CLASSES[character]}]"
    if character in "DW" and not in_class:
        return f"[^{_ASCII_CLASSES[character.lower()]}]"
    if character == "/":
        return "/"
    if character == "c":
        raise CallError("SyntaxError", "\\c is not supported in patterns")
    return f"\\{character}"


# -- globs -------------------------------------------------------------------------------------------------------------

_GROUPS = {"?": ")?", "*": ")*", "+": ")+", "@": ")", "!": ")[^/]*"}
_CLASSES = {
    "alnum": r"A-Za-z0-9", "alpha": "A-Za-z", "ascii": r"\x00-\x7f", "blank": r"\t ", "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9", "graph": r"\x21-\x7e", "lower": "a-z", "print": r"\x20-\x7e",
    "punct": r"""!"\#$%\&'()*+,\-./:;<=>?@\[\\\]^_`{\|}\~""", "space": r"\s\v", "upper": "A-Z", "word": r"\w",
    "xdigit": "0-9A-Fa-f",
}  # fmt: skip


def from_glob(glob: str, *, extended: bool = True, globstar: bool = True, case_insensitive: bool = False) -> Matcher:
    """Return a function that matches a whole path against a glob of @std/path.

    :param extended: allow `?(a|b)`, `*(a|b)`, `+(a|b)`, `@(a|b)`, `!(a|b)` besides `*`, `?`, `[...]`, `{a,b}`.
    :param globstar: a segment `**` matches any number of directories.
    :raises CallError: the glob is invalid; from the function, the match timed out.
    """
    segments = [segment for segment in glob.split("/") if segment] if glob.strip("/") else []
    pattern = "/+" if glob.startswith("/") else ""
    for index, segment in enumerate(segments):
        if globstar and segment == "**":
            pattern += "(?:[^/]*(?:/|$)+)*"
            continue
        pattern += _translate_segment(segment, extended=extended)
        pattern += "/+" if index + 1 < len(segments) else "/*"
    return _compile(rf"\A(?:{pattern})\Z", regex.V1 | (regex.IGNORECASE if case_insensitive else 0), glob)


def _translate_segment(text: str, *, extended: bool) -> str:
    out = []
    closers: list[str] = []
    at = 0
    while at < len(text):
        character, following = text[at], text[at + 1 : at + 2]
        if character == "\\" and following:
            out.append(_escape_literal(following))
            at += 2
        elif character == "[" and (end := _class_end(text, at)):
            out.append(_translate_class(text[at + 1 : end]))
            at = end + 1
        elif extended and character in _GROUPS and following == "(":
            out.append("(?!" if character == "!" else "(?:")
            closers.append(_GROUPS[character])
            at += 2
        else:
            out.append(_translate_character(character, closers))
            at += 1
    if closers:  # an unclosed group makes the whole segment literal
        return _escape_literal(text)
    return "".join(out)


def _translate_character(character: str, closers: list[str]) -> str:
    """Translate one character of a glob; push and pop the closing parts of open groups."""
    innermost = closers[-1] if closers else ""
    in_braces, in_group = innermost == "}", innermost not in ("", "}")
    if character == ")" and in_group:
        return closers.pop()
    if character == "}" and in_braces:
        closers.pop()
        return ")"
    if character == "{":
        closers.append("}")
        return "(?:"
    if (character == "|" and in_group) or (character == "," and in_braces):
        return "|"
    return {"*": "[^/]*", "?": "[^/]"}.get(character) or _escape_literal(character)


def _escape_literal(text: str) -> str:
    escaped: str = regex.escape(text)
    return escaped


def _class_end(text: str, start: int) -> int:
    """Return the index of the `]` that ends a character class, or 0."""
    at = start + 1
    if text[at : at + 1] in ("!", "^"):
        at += 1
    if text[at : at + 1] == "]":
        at += 1
    while at < len(text):
        if text.startswith("[:", at) and (close := text.find(":]", at)) > 0:
            at = close + 2
        elif text[at] == "]":
            return at
        else:
            at += 1
    return 0


def _translate_class(inside: str) -> str:
    negated = inside[:1] in ("!", "^")
    if negated:
        inside = inside[1:]
    out = []
    at = 0
    while at < len(inside):
        if inside.startswith("[:", at) and (close := inside.find(":]", at)) > 0 and inside[at + 2 : close] in _CLASSES:
            out.append(_CLASSES[inside[at + 2 : close]])
            at = close + 2
            continue
        out.append("\\" + inside[at] if inside[at] in "[]\\^&~|" else inside[at])
        at += 1
    return f"(?!/)[{'^' if negated else ''}{''.join(out)}]"
