"""Turns an error that the guest reports into one of ours."""

from __future__ import annotations

from typing import Any

from agent.common.errors import (
    AgentError,
    AlreadyExists,
    GuestError,
    InvalidSpec,
    InvalidState,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)

_TYPES: dict[str, type[AgentError]] = {
    "NOT_FOUND": NotFound,
    "EXISTS": AlreadyExists,
    "DENIED": PermissionDenied,
    "INVALID": InvalidSpec,
    "STATE": InvalidState,
    "EXHAUSTED": ResourceExhausted,
}
_MAX_TEXT = 4096


def from_guest(value: dict[str, Any]) -> AgentError:
    """Returns the error for an ERROR frame; its fields are hostile and may be missing or of any type.

    The reason is the errno's name, or the guest's own word (EXEC_NOT_FOUND), where it looks like one.
    """
    kind = _TYPES.get(str(value.get("code")), GuestError)
    message = str(value.get("message") or "the guest gave no reason")[:_MAX_TEXT]
    reason = str(value.get("errno") or "")
    valid = 0 < len(reason) <= 63 and reason.isascii() and reason.replace("_", "").isalnum() and reason.isupper()
    return kind(message, reason=reason if valid else None)
