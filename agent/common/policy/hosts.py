"""Host names in the one form that they are compared in: lower case, no trailing dot, A-labels (RFC 5890)."""

from __future__ import annotations

import re

MAX_NAME_BYTES = 253  # RFC 1035, 2.3.4, without the root's dot
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


def normalise(name: str) -> str:
    """Returns the comparable form of a host name.

    Underscores are allowed, since names with them exist and resolve. :raises ValueError: it is not a host name.
    """
    text = name.strip()
    text = text.removesuffix(".")
    if not text.isascii():
        import idna  # its tables take longer to load than all of the command line's code

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
        raise ValueError(f"{name[:80]!r} is no host name and no valid address")  # 1.2.3, 0x7f000001: inet_aton forms
    return text


def same_or_none(name: str) -> str | None:
    """As `normalise`; None for what is not a host name. For names that guests send."""
    try:
        return normalise(name)
    except ValueError:
        return None
