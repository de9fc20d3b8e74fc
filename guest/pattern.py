"""Match paths against glob patterns: `*`, `?`, `[...]` within a name, `**` across directories (glob(7), globstar)."""

from __future__ import annotations

import re

from guest.wire import CallError

_MAX_LENGTH = 4095
_MAX_STARS = 64  # each is a loop in the matcher


class Pattern:
    """A compiled pattern. `fixed` is its leading path without wildcards, where a search can start.

    :param hidden: let wildcards match a leading dot.
    :raises CallError: the pattern is not valid or over a limit.
    """

    def __init__(self, text: str, *, hidden: bool) -> None:
        if not text or "\0" in text or len(text) > _MAX_LENGTH or text.count("*") > _MAX_STARS:
            raise CallError(
                "INVALID", f"a pattern has 1 to {_MAX_LENGTH} characters, no NUL and at most {_MAX_STARS} stars"
            )
        names = [name for name in text.split("/") if name not in ("", ".")]
        if ".." in names:
            raise CallError("INVALID", "a pattern must not contain ..")
        fixed = []
        for name in names:
            if any(letter in name for letter in "*?["):
                break
            fixed.append(name)
        self.fixed = "/".join(fixed if len(fixed) < len(names) else fixed[:-1])
        self._names = [
            None if name == "**" else re.compile(_name_expression(name, hidden=hidden), re.DOTALL) for name in names
        ]
        self._hidden = hidden

    def matches(self, path: str) -> bool:
        """Return whether a path relative to the search's root matches; O(names of the path * names of the pattern)."""
        names = path.split("/") if path else []
        reachable = {0}
        for name in names:
            reachable = self._after(reachable, name)
            if not reachable:
                return False
        return len(self._names) in self._skip_stars(reachable)

    def _skip_stars(self, places: set[int]) -> set[int]:
        result = set(places)
        for place in sorted(places):
            at = place
            while at < len(self._names) and self._names[at] is None:
                at += 1
                result.add(at)
        return result

    def _after(self, places: set[int], name: str) -> set[int]:
        result = set()
        for place in self._skip_stars(places):
            if place == len(self._names):
                continue
            expression = self._names[place]
            if expression is None:
                if self._hidden or not name.startswith("."):
                    result.add(place)
            elif expression.fullmatch(name):
                result.add(place + 1)
        return result


def _name_expression(name: str, *, hidden: bool) -> str:
    """Return a regular expression for one name of a pattern.

    The text between two stars is matched at its first occurrence, without backtracking (an atomic group): a later
    occurrence matches no more names, and no pattern can make the matcher slow.

    :raises CallError: the result is not a valid expression.
    """
    parts = [""]  # expressions of the texts between stars
    at = 0
    while at < len(name):
        letter = name[at]
        at += 1
        end = name.find("]", at + 1 + name.startswith("!", at)) if letter == "[" else -1
        if letter == "*":
            parts.append("")
        elif letter == "?":
            parts[-1] += "."
        elif end > 0:
            parts[-1] += _set_expression(name[at:end])
            at = end + 1
        else:
            parts[-1] += re.escape(letter)
    result = "" if hidden or name.startswith(".") else r"(?!\.)"
    result += parts[0] + "".join(f"(?>.*?{part})" for part in parts[1:-1] if part)
    if len(parts) > 1:
        result += f".*{parts[-1]}"
    try:
        re.compile(result)
    except re.error as error:
        raise CallError("INVALID", f"{name!r} is not a valid pattern: {error}") from None
    return result


def _set_expression(body: str) -> str:
    """Return the regular expression for the text in brackets: letters and ranges, negated by a leading "!"."""
    negated = body.startswith("!")
    result, at = "[^" if negated else "[", int(negated)
    while at < len(body):
        result += re.escape(body[at])
        at += 1
        if body.startswith("-", at) and at + 1 < len(body):
            result += f"-{re.escape(body[at + 1])}"
            at += 2
    return result + "]"
