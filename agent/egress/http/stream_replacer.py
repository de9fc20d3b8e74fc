"""Replaces byte strings in a stream, as it goes by: never holding back more than what could begin one of them."""

from __future__ import annotations

import re
from collections.abc import Mapping


class StreamReplacer:
    """Replaces each key by its value; keys that overlap: the longest first. `count` is how many were replaced."""

    def __init__(self, pairs: Mapping[bytes, bytes]) -> None:
        self._pairs = {needle: pairs[needle] for needle in sorted(pairs, key=len, reverse=True) if needle}
        self._pattern = re.compile(b"|".join(re.escape(needle) for needle in self._pairs) or rb"(?!)")
        self._longest = max(map(len, self._pairs), default=0)
        self._first = frozenset(needle[0] for needle in self._pairs)
        self._tail = b""
        self.count = 0

    def feed(self, data: bytes) -> bytes:
        """Returns what can be passed on now."""
        data = self._tail + data
        data, end = self._replaced(data)
        keep = self._begun(data, end)
        self._tail = data[len(data) - keep :]
        return data[: len(data) - keep]

    def end(self) -> bytes:
        """Returns what was held back."""
        tail, self._tail = self._tail, b""
        return tail

    def whole(self, data: bytes) -> bytes:
        """Returns a text that is complete, with all replaced."""
        return self._replaced(data)[0]

    def _replaced(self, data: bytes) -> tuple[bytes, int]:
        """Returns the text, and where in it what was put in ends: that is not looked at again."""
        if not any(needle in data for needle in self._pairs):
            return data, 0
        pieces = []
        at = 0
        for match in self._pattern.finditer(data):
            pieces += [data[at : match.start()], self._pairs[match[0]]]
            at = match.end()
            self.count += 1
        end = sum(map(len, pieces))
        return b"".join([*pieces, data[at:]]), end

    def _begun(self, data: bytes, after: int) -> int:
        """Returns how many of the last bytes are the beginning of a key."""
        start = max(len(data) - self._longest + 1, after)
        for at in range(start, len(data)):
            if data[at] in self._first and any(needle.startswith(data[at:]) for needle in self._pairs):
                return len(data) - at
        return 0
