"""Errors as the SDKs get them: the error object of a call, the body of a refused request."""

from __future__ import annotations

import grpc

from agent.common.api_client import reason_of

# Deno's own convention for errno(3) names.
_BY_ERRNO = {
    "ENOENT": "NotFound", "EACCES": "PermissionDenied", "EPERM": "PermissionDenied", "EEXIST": "AlreadyExists",
    "ENOTDIR": "NotADirectory", "EISDIR": "IsADirectory", "ELOOP": "FilesystemLoop", "EBADF": "BadResource",
    "EBUSY": "Busy", "EPIPE": "BrokenPipe", "ETIMEDOUT": "TimedOut", "EINTR": "Interrupted", "ECONNREFUSED":
    "ConnectionRefused", "ECONNRESET": "ConnectionReset", "ECONNABORTED": "ConnectionAborted", "ENOTCONN":
    "NotConnected", "EADDRINUSE": "AddrInUse", "EADDRNOTAVAIL": "AddrNotAvailable", "ENETUNREACH": "NetworkUnreachable",
    "EHOSTUNREACH": "NetworkUnreachable", "EAGAIN": "WouldBlock",
}  # fmt: skip
_BY_REASON = {
    "EXEC_NOT_FOUND": ("NotFound", "ENOENT"), "CWD_INVALID": ("NotFound", "ENOENT"),
    "EXEC_NOT_EXECUTABLE": ("PermissionDenied", "EACCES"), "NOT_REGULAR": ("NotSupported", None),
    "PROCESS_EXITED": ("TypeError", "ENOENT"),
}  # fmt: skip
_BY_STATUS = {
    grpc.StatusCode.NOT_FOUND: "NotFound", grpc.StatusCode.ALREADY_EXISTS: "AlreadyExists",
    grpc.StatusCode.PERMISSION_DENIED: "PermissionDenied", grpc.StatusCode.INVALID_ARGUMENT: "TypeError",
    grpc.StatusCode.DEADLINE_EXCEEDED: "TimedOut", grpc.StatusCode.UNAVAILABLE: "ConnectionAborted",
}  # fmt: skip


class Failure(Exception):
    """A call failed: what the client's SDK makes its exception of.

    :param kind: class name, such as "NotFound"; see agent/gateway/errors.py for which there are.
    :param code: errno name.
    :param name: of a DOMException.
    """

    def __init__(self, kind: str, message: str, *, code: str | None = None, name: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.code = code
        self.name = name
        self.stack: str | None = None

    def to_json(self) -> dict[str, object]:
        """Returns the error object of the protocol."""
        return {
            "constructorName": self.kind, "message": self.message, "code": self.code, "name": self.name,
            "stack": self.stack, "cause": None, "errors": None, "error": None, "suppressed": None,
        }  # fmt: skip


class Refusal(Exception):
    """A request is answered with an HTTP status and {"code", "message"}."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


def aborted() -> Failure:
    """Returns the failure of a call whose AbortSignal fired."""
    return Failure("DOMException", "The signal has been aborted", name="AbortError")


def process_gone(pid: int) -> Failure:
    """Returns the failure of what can only be done to a running process; both SDKs know it by its code."""
    return Failure("TypeError", f"process {pid} has exited already, or there is none", code="ENOENT")


def from_errno(name: str, message: str) -> Failure:
    """Returns the failure that stands for an errno(3) name."""
    return Failure(_BY_ERRNO.get(name, "Error"), message, code=name or None)


def from_rpc(error: grpc.aio.AioRpcError) -> Failure:
    """Returns the failure that stands for a failed call to a node."""
    reason, message = reason_of(error), error.details() or "the call failed"
    if reason in _BY_ERRNO:
        return from_errno(reason, message)
    if reason in _BY_REASON:
        kind, code = _BY_REASON[reason]
        return Failure(kind, message, code=code)
    is_errno = reason.startswith("E") and reason.isalnum()
    return Failure(_BY_STATUS.get(error.code(), "Error"), message, code=reason if is_errno else None)


_HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400, grpc.StatusCode.NOT_FOUND: 404, grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 409, grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.PERMISSION_DENIED: 403, grpc.StatusCode.DEADLINE_EXCEEDED: 504, grpc.StatusCode.UNAVAILABLE: 503,
}  # fmt: skip


def refusal_from_rpc(error: grpc.aio.AioRpcError) -> Refusal:
    """Returns the refusal that stands for a failed call to a node."""
    return Refusal(
        _HTTP_STATUS.get(error.code(), 500), reason_of(error) or error.code().name, error.details() or "the call failed"
    )
