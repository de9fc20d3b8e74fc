"""Replacing byte strings in a stream. It only delays bytes that may be the beginning of a match."""

from __future__ import annotations

import re
from collections.abc import Mapping


class StreamReplacer:
    """Replace each key by its value, of overlapping keys the longest. `count` is the number of replacements."""

    def __init__(self, pairs: Mapping[bytes, bytes]) -> None:
        self._pairs = {needle: pairs[needle] for needle in sorted(pairs, key=len, reverse=True) if needle}
        self._pattern = re.compile(b"|".join(re.escape(needle) for needle in self._pairs) or rb"(?!)")
        self._longest = max(map(len, self._pairs), default=0)
        self._first = frozenset(needle[0] for needle in self._pairs)
        self._tail = b""
        self.count = 0

    def feed(self, data: bytes) -> bytes:
        """Add data; return the output that is certain."""
        data = self._tail + data
        data, end = self._replaced(data)
        keep = self._begun(data, end)
        self._tail = data[len(data) - keep :]
        return data[: len(data) - keep]

    def end(self) -> bytes:
        """Return the delayed rest, at the end of the stream."""
        tail, self._tail = self._tail, b""
        return tail

    def whole(self, data: bytes) -> bytes:
        """Return a complete text with all keys replaced."""
        return self._replaced(data)[0]

    def _replaced(self, data: bytes) -> tuple[bytes, int]:
        """Return the text after replacement, and the end of the last value in it, before which no match may begin."""
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
        """Return the number of bytes at the end that are the beginning of a key."""
        start = max(len(data) - self._longest + 1, after)
        for at in range(start, len(data)):
            if data[at] in self._first and any(needle.startswith(data[at:]) for needle in self._pairs):
                return len(data) - at
        return 0
