"""Normalised host names, for comparison: lower case, no trailing dot, A-labels (RFC 5890)."""

from __future__ import annotations

import re

MAX_NAME_BYTES = 253  # RFC 1035, 2.3.4, without the root's dot
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


def normalise(name: str) -> str:
    """Normalise a host name. Underscores are allowed, since names with them exist and resolve.

    :raises ValueError: the text is not a host name.
    """
    text = name.strip()
    text = text.removesuffix(".")
    if not text.isascii():
        import idna  # its tables take longer to load than all other code of the command line

        try:
            text = idna.encode(text, uts46=True, transitional=False).decode()
        except idna.IDNAError as error:
            raise ValueError(f"{name[:80]!r} is not a valid international host name: {error}") from None
    text = text.lower()
    if not text or len(text) > MAX_NAME_BYTES:
        raise ValueError(f"{name[:80]!r} is not a host name: it has {len(text)} characters, 1 to 253 are allowed")
    labels = text.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{name[:80]!r} is not a host name; use letters, digits and '-', in labels of 1 to 63")
    if labels[-1].isdecimal() or re.fullmatch(r"0x[0-9a-f]*", labels[-1]):
        # inet_aton(3) takes 1.2.3 and 0x7f000001 for addresses.
        raise ValueError(f"{name[:80]!r} is neither a host name nor a valid address")
    return text


def same_or_none(name: str) -> str | None:
    """Normalise a host name from a guest; None if it is not a host name."""
    try:
        return normalise(name)
    except ValueError:
        return None
