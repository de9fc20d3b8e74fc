"""Convert sandbox ids between the API and the SDKs.

API: "sbx-" and 16 characters. SDKs: "sbx_", three letters of the region, "_", 20 characters; the JavaScript SDK rejects
other forms (`Sandbox.connect` of @deno/sandbox 0.13.2). The conversion is arithmetic, so that no table has to be stored
and all gateways in front of a node use the same id.
"""

from __future__ import annotations

import re
import string

from agent.common.model import ID_PREFIX, is_sandbox_id

_API_DIGITS = string.digits + string.ascii_lowercase
_SDK_DIGITS = "0123456789abcdefghjkmnpqrstuvwxyz"
_API_LENGTH, _SDK_LENGTH = 16, 20
_SDK_FORM = re.compile(rf"sbx_[a-z]{{3}}_([{_SDK_DIGITS}]{{{_SDK_LENGTH}}})")


def region_letters(region: str) -> str:
    """Return three lower-case letters for a region: "ord" for "ord", "loc" for "local", padded with "x"."""
    letters = re.sub("[^a-z]", "", region.lower())
    return letters[:3].ljust(3, "x")


def to_sdk(sandbox_id: str, region: str) -> str:
    """Return the SDKs' form of an API id."""
    number = int(sandbox_id.removeprefix(ID_PREFIX), len(_API_DIGITS))
    digits = []
    for _ in range(_SDK_LENGTH):
        number, digit = divmod(number, len(_SDK_DIGITS))
        digits.append(_SDK_DIGITS[digit])
    return f"sbx_{region_letters(region)}_{''.join(reversed(digits))}"


def from_sdk(text: str) -> str | None:
    """Return the API's form of an SDK id, or None if no sandbox can have this id."""
    match = _SDK_FORM.fullmatch(text)
    if match is None:
        return None
    number = 0
    for letter in match[1]:
        number = number * len(_SDK_DIGITS) + _SDK_DIGITS.index(letter)
    digits = []
    for _ in range(_API_LENGTH):
        number, digit = divmod(number, len(_API_DIGITS))
        digits.append(_API_DIGITS[digit])
    sandbox_id = ID_PREFIX + "".join(reversed(digits))
    return sandbox_id if not number and is_sandbox_id(sandbox_id) else None
