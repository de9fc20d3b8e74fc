"""Errors in the form that the SDKs expect.

Two kinds: `CallError` is the error object of a JSON-RPC call, `HttpError` is the JSON body of a failed HTTP request.
Both have a translation from a failed gRPC call to a node.
"""

from __future__ import annotations

import grpc

from agent.common.api_client import reason_of

# Class names of Deno's errors for errno(3) names.
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


class CallError(Exception):
    """Error of a JSON-RPC call, from which the client's SDK makes an exception.

    :param kind: name of the JavaScript class, such as "NotFound" or "TypeError".
    :param code: errno(3) name, such as "ENOENT".
    :param name: name of a DOMException, such as "AbortError".
    """

    def __init__(self, kind: str, message: str, *, code: str | None = None, name: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.code = code
        self.name = name
        self.stack: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return the error object of the protocol."""
        return {
            "constructorName": self.kind, "message": self.message, "code": self.code, "name": self.name,
            "stack": self.stack, "cause": None, "errors": None, "error": None, "suppressed": None,
        }  # fmt: skip


class HttpError(Exception):
    """Error response to an HTTP request: a status, and {"code", "message"} as its JSON body."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


def aborted() -> CallError:
    """Return the error of a call whose AbortSignal fired."""
    return CallError("DOMException", "The signal has been aborted", name="AbortError")


def process_gone(pid: int) -> CallError:
    """Return the error of an operation on a process that has exited or never existed; the SDKs recognize ENOENT."""
    return CallError("TypeError", f"process {pid} has exited or does not exist", code="ENOENT")


def call_error_from_errno(name: str, message: str) -> CallError:
    """Return the error for an errno(3) name."""
    return CallError(_BY_ERRNO.get(name, "Error"), message, code=name or None)


def call_error_from_rpc(error: grpc.aio.AioRpcError) -> CallError:
    """Return the call's error for a failed gRPC call to a node."""
    reason, message = reason_of(error), error.details() or "the call failed"
    if reason in _BY_ERRNO:
        return call_error_from_errno(reason, message)
    if reason in _BY_REASON:
        kind, code = _BY_REASON[reason]
        return CallError(kind, message, code=code)
    is_errno = reason.startswith("E") and reason.isalnum()
    return CallError(_BY_STATUS.get(error.code(), "Error"), message, code=reason if is_errno else None)


_HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400, grpc.StatusCode.NOT_FOUND: 404, grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 409, grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.PERMISSION_DENIED: 403, grpc.StatusCode.DEADLINE_EXCEEDED: 504, grpc.StatusCode.UNAVAILABLE: 503,
}  # fmt: skip


def http_error_from_rpc(error: grpc.aio.AioRpcError) -> HttpError:
    """Return the error response for a failed gRPC call to a node."""
    return HttpError(
        _HTTP_STATUS.get(error.code(), 500), reason_of(error) or error.code().name, error.details() or "the call failed"
    )
