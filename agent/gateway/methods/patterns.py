"""Patterns of clients: JavaScript regular expressions and globs, as compiled `regex` patterns.

Patterns are searched in `_TIMEOUT_S` at most each, since a hostile one can take for ever.

Globs are those of Deno's @std/path (globToRegExp), and wcmatch 12 cannot replace this module: a differential test
found 1 to 3 % of random pairs that differ. In wcmatch, `a/` does not match "a", `*` matches neither "." nor "", `{}`
stands for itself, and a backslash at the end for nothing. Nor has it a time limit for a match.
"""

from __future__ import annotations

from collections.abc import Callable

import regex

from agent.gateway.errors import Failure

_TIMEOUT_S = 0.05
_FLAGS = {"i": regex.IGNORECASE, "m": regex.MULTILINE, "s": regex.DOTALL, "u": 0, "v": 0, "g": 0, "y": 0, "d": 0}
_NAMED = regex.compile(r"\\k<(\w+)>")
_ASCII_CLASSES = {"d": "0-9", "w": "A-Za-z0-9_"}

Matcher = Callable[[str], bool]


def from_javascript(source: str, flags: str) -> Matcher:
    """Returns whether a text has a match of a RegExp. :raises Failure: it is none, or has no counterpart here."""
    bits = regex.V1
    for flag in flags:
        if flag not in _FLAGS:
            raise Failure("SyntaxError", f"unknown flag {flag!r} of a regular expression")
        bits |= _FLAGS[flag]
    return _compiled(_translated(source, multiline="m" in flags), bits, source)


def _compiled(pattern: str, bits: int, shown: str) -> Matcher:
    try:
        compiled = regex.compile(pattern, bits)
    except (regex.error, RecursionError, OverflowError) as error:
        raise Failure("SyntaxError", f"invalid pattern {shown[:200]!r}: {error}") from None

    def matches(text: str) -> bool:
        try:
            return compiled.search(text, timeout=_TIMEOUT_S) is not None
        except TimeoutError:
            raise Failure("Error", f"the pattern {shown[:200]!r} takes too long") from None

    return matches


def _translated(source: str, *, multiline: bool) -> str:
    """Returns the same pattern in the words of `regex`, where the two languages differ."""
    out = []
    in_class = False
    at = 0
    while at < len(source):
        letter = source[at]
        if (reference := _NAMED.match(source, at)) and not in_class:
            out.append(f"(?P={reference[1]})")
            at = reference.end()
            continue
        if letter == "\\" and at + 1 < len(source):
            out.append(_escape(source[at + 1], in_class=in_class))
            at += 2
            continue
        if in_class:
            in_class = letter != "]"
            out.append("\\[" if letter == "[" else "\\" + letter if letter in "&~|" else letter)
        elif source.startswith("[^]", at) or source.startswith("[]", at):
            out.append("(?s:.)" if source[at + 1] == "^" else "(?!)")
            at += 3 if source[at + 1] == "^" else 2
            continue
        elif letter == "[":
            in_class = True
            out.append(letter)
            if source.startswith("[^", at):
                out.append("^")
                at += 1
        elif letter == "$" and not multiline:
            out.append(r"\Z")  # not before a last line break, as there
        else:
            out.append(letter)
        at += 1
    return "".join(out)


def _escape(letter: str, *, in_class: bool) -> str:
    if letter in _ASCII_CLASSES:
        return _ASCII_CLASSES[letter] if in_class else f"[{_ASCII_CLASSES[letter]}]"
    if letter in "DW" and not in_class:
        return f"[^{_ASCII_CLASSES[letter.lower()]}]"
    if letter == "/":
        return "/"
    if letter == "c":
        raise Failure("SyntaxError", "\\c is not supported in patterns")
    return f"\\{letter}"


# -- globs -------------------------------------------------------------------------------------------------------------

_GROUPS = {"?": ")?", "*": ")*", "+": ")+", "@": ")", "!": ")[^/]*"}
_CLASSES = {
    "alnum": r"A-Za-z0-9", "alpha": "A-Za-z", "ascii": r"\x00-\x7f", "blank": r"\t ", "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9", "graph": r"\x21-\x7e", "lower": "a-z", "print": r"\x20-\x7e",
    "punct": r"""!"\#$%\&'()*+,\-./:;<=>?@\[\\\]^_`{\|}\~""", "space": r"\s\v", "upper": "A-Z", "word": r"\w",
    "xdigit": "0-9A-Fa-f",
}  # fmt: skip


def from_glob(glob: str, *, extended: bool = True, globstar: bool = True, case_insensitive: bool = False) -> Matcher:
    """Returns whether a whole path matches a glob: `*`, `?`, `**` as a whole segment, `[...]`, `{a,b}`; extended also
    `?(a|b)`, `*(a|b)`, `+(a|b)`, `@(a|b)`, `!(a|b)`. :raises Failure: it cannot be a pattern.
    """
    segments = [segment for segment in glob.split("/") if segment] if glob.strip("/") else []
    pattern = "/+" if glob.startswith("/") else ""
    for index, segment in enumerate(segments):
        if globstar and segment == "**":
            pattern += "(?:[^/]*(?:/|$)+)*"
            continue
        pattern += _segment(segment, extended=extended)
        pattern += "/+" if index + 1 < len(segments) else "/*"
    return _compiled(rf"\A(?:{pattern})\Z", regex.V1 | (regex.IGNORECASE if case_insensitive else 0), glob)


def _segment(text: str, *, extended: bool) -> str:
    out = []
    closers: list[str] = []
    at = 0
    while at < len(text):
        letter, following = text[at], text[at + 1 : at + 2]
        if letter == "\\" and following:
            out.append(_escaped(following))
            at += 2
        elif letter == "[" and (end := _class_end(text, at)):
            out.append(_class(text[at + 1 : end]))
            at = end + 1
        elif extended and letter in _GROUPS and following == "(":
            out.append("(?!" if letter == "!" else "(?:")
            closers.append(_GROUPS[letter])
            at += 2
        else:
            out.append(_letter(letter, closers))
            at += 1
    if closers:  # a group that is not closed stands for itself
        return _escaped(text)
    return "".join(out)


def _letter(letter: str, closers: list[str]) -> str:
    """Returns what one letter of a glob stands for inside the groups that are open; opens and closes groups."""
    innermost = closers[-1] if closers else ""
    in_braces, in_group = innermost == "}", innermost not in ("", "}")
    if letter == ")" and in_group:
        return closers.pop()
    if letter == "}" and in_braces:
        closers.pop()
        return ")"
    if letter == "{":
        closers.append("}")
        return "(?:"
    if (letter == "|" and in_group) or (letter == "," and in_braces):
        return "|"
    return {"*": "[^/]*", "?": "[^/]"}.get(letter) or _escaped(letter)


def _escaped(text: str) -> str:
    escaped: str = regex.escape(text)
    return escaped


def _class_end(text: str, start: int) -> int:
    """Returns where a class ends, 0 if it does not."""
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


def _class(inside: str) -> str:
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
