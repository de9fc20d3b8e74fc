"""The one table from our errors to gRPC status codes, and the ErrorInfo that every error carries (AIP-193)."""

from __future__ import annotations

import secrets

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from agent import errors
from agent.errors import AgentError
from agent.sandbox.events import WatcherTooSlow
from agent.telemetry import ERRORS, log

DOMAIN = "sandboxd"
_MAX_MESSAGE = 8000  # headers of HTTP/2 are limited; consoles are long

CODES: dict[type[AgentError], grpc.StatusCode] = {
    errors.InvalidSpec: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.InvalidState: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.GuestError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.GuestUnreachable: grpc.StatusCode.UNAVAILABLE,
    errors.VmmError: grpc.StatusCode.INTERNAL,
    errors.HostError: grpc.StatusCode.INTERNAL,
    WatcherTooSlow: grpc.StatusCode.OUT_OF_RANGE,
}


def code_of(error: AgentError) -> grpc.StatusCode:
    """Returns the status code of an error, by its nearest class in the table."""
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return grpc.StatusCode.INTERNAL


def to_status(error: BaseException) -> tuple[grpc.StatusCode, grpc.Status]:
    """Returns code and rich status. What is not ours gets a fixed text and an incident id, and is logged in full."""
    if not isinstance(error, AgentError):
        incident = secrets.token_hex(4)
        log.error("internal error", incident=incident, exc_info=error)
        error = AgentError(
            f"internal error, incident {incident}: look for it in the agent's log", reason="INTERNAL", incident=incident
        )
    ERRORS.labels(error.reason).inc()
    code = code_of(error)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    detail = any_pb2.Any()
    detail.Pack(info)
    number: int = code.value[0]
    return code, rpc_status.to_status(
        status_pb2.Status(code=number, message=error.message[:_MAX_MESSAGE], details=[detail])
    )
