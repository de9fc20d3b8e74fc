"""Sandbox ids: the API's "sbx-" and 16 characters, and the SDKs' "sbx_", a region of three letters, "_", 20 characters.

The JavaScript SDK refuses other forms (`Sandbox.connect` of @deno/sandbox 0.13.2). One is computed from the other, so
that nothing has to be kept, and every gateway in front of a node says the same id.
"""

from __future__ import annotations

import re
import string

from agent.common.model import ID_PREFIX, is_sandbox_id

_OURS = string.digits + string.ascii_lowercase
_THEIRS = "0123456789abcdefghjkmnpqrstuvwxyz"
_OUR_LENGTH, _THEIR_LENGTH = 16, 20
_FORM = re.compile(rf"sbx_[a-z]{{3}}_([{_THEIRS}]{{{_THEIR_LENGTH}}})")


def region_letters(region: str) -> str:
    """Returns three lower-case letters that stand for a region: "ord" for "ord", "loc" for "local"."""
    letters = re.sub("[^a-z]", "", region.lower())
    return letters[:3].ljust(3, "x")


def to_sdk(sandbox_id: str, region: str) -> str:
    """Returns the SDKs' id of a sandbox."""
    number = int(sandbox_id.removeprefix(ID_PREFIX), len(_OURS))
    digits = []
    for _ in range(_THEIR_LENGTH):
        number, digit = divmod(number, len(_THEIRS))
        digits.append(_THEIRS[digit])
    return f"sbx_{region_letters(region)}_{''.join(reversed(digits))}"


def from_sdk(text: str) -> str | None:
    """Returns the API's id; None for what cannot be a sandbox's."""
    match = _FORM.fullmatch(text)
    if match is None:
        return None
    number = 0
    for letter in match[1]:
        number = number * len(_THEIRS) + _THEIRS.index(letter)
    digits = []
    for _ in range(_OUR_LENGTH):
        number, digit = divmod(number, len(_OURS))
        digits.append(_OURS[digit])
    sandbox_id = ID_PREFIX + "".join(reversed(digits))
    return sandbox_id if not number and is_sandbox_id(sandbox_id) else None
