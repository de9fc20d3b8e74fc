"""Translate errors to gRPC statuses: the table of status codes, and the ErrorInfo of each error (AIP-193)."""

from __future__ import annotations

import errno
import secrets

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from agent.common import errors
from agent.common.errors import AgentError
from agent.common.telemetry import ERRORS, log
from agent.daemon.host.threads import too_many_tasks
from agent.daemon.rpc.convert.guest_values import printable
from agent.daemon.sandbox.state.events import WatcherTooSlowError

DOMAIN = "sandboxd"
# gRPC sends the message twice in the trailers, once percent-encoded; clients refuse trailers over 16 KiB.
_MAX_MESSAGE_CHARS = 3000
_MAX_REASONS = 200
_reasons: set[str] = set()

CODES: dict[type[AgentError], grpc.StatusCode] = {
    errors.InvalidSpec: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.InvalidState: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NodeDraining: grpc.StatusCode.UNAVAILABLE,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.GuestError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.GuestUnreachable: grpc.StatusCode.UNAVAILABLE,
    errors.VmmError: grpc.StatusCode.INTERNAL,
    errors.VmmUnsupported: grpc.StatusCode.UNIMPLEMENTED,
    errors.HostError: grpc.StatusCode.INTERNAL,
    errors.ImageDamaged: grpc.StatusCode.DATA_LOSS,
    WatcherTooSlowError: grpc.StatusCode.OUT_OF_RANGE,
}


def code_of(error: AgentError) -> grpc.StatusCode:
    """Return the status code of an error: that of its nearest base class in the table."""
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return grpc.StatusCode.INTERNAL


def to_status(error: BaseException) -> tuple[grpc.StatusCode, grpc.Status]:
    """Return the code and the rich status (with ErrorInfo) of an error, and count it.

    An error that is not an AgentError is logged in full; the caller gets a fixed text with an incident id instead.
    """
    error = _host_limit(error) or error
    if not isinstance(error, AgentError):
        incident = secrets.token_hex(4)
        log.error("internal error", incident=incident, exc_info=error)
        error = AgentError(
            f"internal error; search the agent's log for incident {incident}", reason="INTERNAL", incident=incident
        )
    ERRORS.labels(_label(error.reason)).inc()
    code = code_of(error)
    metadata = {key: printable(value) for key, value in error.metadata.items()}
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    detail = any_pb2.Any()
    detail.Pack(info)
    number: int = code.value[0]
    return code, rpc_status.to_status(
        status_pb2.Status(code=number, message=_shortened(printable(error.message)), details=[detail])
    )


def _host_limit(error: BaseException) -> AgentError | None:
    """Return a ResourceExhausted for an error that means a limit of the host (open files, threads); None otherwise."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return errors.ResourceExhausted(
            "the agent has no file descriptors left (Too many open files): close connections, or raise LimitNOFILE",
            reason="TOO_MANY_FILES",
        )  # fmt: skip
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return too_many_tasks()
    return None


def _shortened(text: str) -> str:
    """Cut the middle out of a long message: it begins with what happened and ends with the last console lines."""
    if len(text) <= _MAX_MESSAGE_CHARS:
        return text
    return f"{text[: _MAX_MESSAGE_CHARS // 2]} ... {text[-_MAX_MESSAGE_CHARS // 2 :]}"


def _label(reason: str) -> str:
    """Return the reason as a label of a metric, at most _MAX_REASONS different ones: guests can invent reasons."""
    if reason not in _reasons and len(_reasons) >= _MAX_REASONS:
        return "OTHER"
    _reasons.add(reason)
    return reason
