"""Placeholders of secrets: random text that cannot be guessed, in characters that no encoding escapes."""

from __future__ import annotations

import secrets
import string

from agent.common.errors import InvalidSpec

PREFIX = "sbx_secret_"
_LETTERS = string.ascii_letters + string.digits
_RANDOM_LETTERS = 32  # 190 bits
_MIN_RANDOM_LETTERS = 16  # 95 bits, of a placeholder in the shape of a token
# Prefixes by which programs recognise a kind of token, as their issuers publish them.
_KNOWN_PREFIXES = (
    "sk-ant-api03-", "sk-ant-", "sk-proj-", "sk-or-v1-", "sk_live_", "sk_test_", "rk_live_", "rk_test_", "pk_live_",
    "pk_test_", "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xoxb-", "xoxp-", "xapp-",
    "hf_", "npm_", "pypi-", "dop_v1_", "AKIA", "ASIA", "AIza", "SG.", "ddp_", "ddo_", "figd_", "lin_api_", "dckr_pat_",
)  # fmt: skip


def new_placeholder(like: str = "") -> str:
    """Return a new placeholder, in the shape of the token `like` if one is given.

    The shape is the token's length, the class of each character (a-z, A-Z, 0-9), and the prefix of its kind.

    :raises InvalidSpec: the token is too short: a placeholder of its shape could be guessed.
    """
    if not like:
        return PREFIX + "".join(secrets.choice(_LETTERS) for _ in range(_RANDOM_LETTERS))
    prefix = next((known for known in _KNOWN_PREFIXES if like.startswith(known)), "")
    shaped = [_same_kind(letter) for letter in like[len(prefix) :]]
    drawn = sum(letter.isascii() and letter.isalnum() for letter in like[len(prefix) :])
    if drawn < _MIN_RANDOM_LETTERS:
        raise InvalidSpec(
            f"the value has {drawn} letters and digits after its prefix; a placeholder in its shape needs "
            f"{_MIN_RANDOM_LETTERS}: leave keep_shape out"
        )
    return prefix + "".join(shaped)


def _same_kind(letter: str) -> str:
    for kind in (string.ascii_lowercase, string.ascii_uppercase, string.digits):
        if letter in kind:
            return secrets.choice(kind)
    return letter if letter in "-_." else "-"
