"""Wire format of the SDKs' protocol: JSON-RPC 2.0 requests, and notifications that carry byte streams.

Unknown members are ignored. Bytes are base64 in JSON.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from agent.gateway.errors import CallError

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, INTERNAL_ERROR = -32700, -32600, -32601, -32602, -32603
STREAM_PREFIX = "$sandbox.stream."

Send = Callable[[object], Awaitable[None]]


class Message(msgspec.Struct):
    """A request, or a notification if `id` is None. `params` is the undecoded JSON."""

    method: str
    id: int | None = None
    params: msgspec.Raw = msgspec.Raw(b"{}")


class StreamEvent(msgspec.Struct, rename="camel"):
    """Parameters of a notification about a stream."""

    stream_id: int
    data: bytes = b""
    error: Any = None


class Params(msgspec.Struct, rename="camel"):
    """Base of the parameters of a method; null equals absent. A member `abort_id` makes the call abortable."""


encode = msgspec.json.Encoder().encode
decode_message = msgspec.json.Decoder(Message).decode
decode_stream_event = msgspec.json.Decoder(StreamEvent).decode


def notification(method: str, **params: object) -> dict[str, object]:
    """Return a message without a response."""
    return {"jsonrpc": "2.0", "method": method, "params": params}


def stream_notification(event: str, stream_id: int, **params: object) -> dict[str, object]:
    """Return a notification about a stream. :param event: "start", "enqueue", "end", "error" or "cancel"."""
    return notification(f"{STREAM_PREFIX}{event}", streamId=stream_id, **params)


def result_message(request_id: int, result: dict[str, object]) -> bytes:
    """Return the response to a request, encoded. :param result: {"ok": value} or {"error": error object}."""
    return encode({"jsonrpc": "2.0", "id": request_id, "result": result})


def error_message(request_id: int | None, code: int, message: str, data: object = None) -> dict[str, object]:
    """Return a JSON-RPC error response. :param code: one of the constants of this module."""
    error: dict[str, object] = {"code": code, "message": message}
    if data is not None:
        error["data"] = data
    return {"jsonrpc": "2.0", "id": request_id, "error": error}


def stream_error(error: Any) -> CallError:
    """Return the error with which a client ended its stream: an error object, or from Python a bare text."""
    if isinstance(error, dict):
        return CallError(str(error.get("constructorName") or "Error")[:64], str(error.get("message") or "stream error"))
    return CallError("Error", str(error or "the stream failed"))


def zod_error(text: str) -> dict[str, object]:
    """Convert a validation error of msgspec to the form that the Python SDK parses, that of a ZodError.

    Its message is a JSON list of {expected, code, path, message}.
    """
    message, _, where = text.partition(" - at `$")
    expected = message.partition("`")[2].partition("`")[0]
    path = [part for part in where.rstrip("`").replace("[", ".").replace("]", "").split(".") if part]
    if "missing required field" in message:
        path, expected = [*path, expected], "value"
    items = [{"expected": expected or "value", "code": "invalid_type", "path": path, "message": message}]
    return {"constructorName": "ZodError", "message": encode(items).decode()}
