"""Dispatch of JSON-RPC calls: decode the parameters, run the method's handler, and answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple

import grpc
import msgspec

from agent.common.telemetry import log, tracer
from agent.gateway.errors import CallError, call_error_from_rpc
from agent.gateway.jsonrpc.connection import RpcConnection
from agent.gateway.jsonrpc.messages import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    METHOD_NOT_FOUND,
    Message,
    Params,
    zod_error,
)
from agent.gateway.jsonrpc.stream_table import call_answered
from agent.gateway.metrics import CALL_SECONDS, CALLS_OPEN

# Takes the parameters in the type of the method's table row; returns the value of "ok", which must encode to JSON.
Handler = Callable[[RpcConnection, Any], Coroutine[Any, Any, object]]


class Method(NamedTuple):
    """One row of the method table."""

    params: type[Params]
    handler: Handler


MethodTable = Mapping[str, Method]


async def run_call(connection: RpcConnection, methods: MethodTable, message: Message) -> None:
    """Run one call and answer it; no exception of a handler leaves this function."""
    start = time.perf_counter()
    label, outcome = message.method if message.method in methods else "unknown", "ok"
    answered = asyncio.Event()
    call_answered.set(answered)
    CALLS_OPEN.inc()
    try:
        with tracer.start_as_current_span(f"gateway.{label}"):
            outcome = await _run(connection, methods, message)
    finally:
        answered.set()
        CALLS_OPEN.dec()
        CALL_SECONDS.labels(label, outcome).observe(time.perf_counter() - start)


async def _run(connection: RpcConnection, methods: MethodTable, message: Message) -> str:
    """Run a call and answer it; return its outcome for the metrics."""
    request_id, method = message.id, methods.get(message.method)
    assert request_id is not None
    if method is None:
        await connection.send_error(request_id, METHOD_NOT_FOUND, "Method not found")
        return "no_method"
    try:
        params = msgspec.json.decode(message.params, type=method.params)
        message.params = msgspec.Raw(b"")  # frees a large request while its call runs
        result: dict[str, object] = {"ok": await _call(connection, method.handler, params)}
    except msgspec.DecodeError as error:
        await connection.send_error(request_id, INVALID_PARAMS, f"invalid parameters: {error}", zod_error(str(error)))
        return "invalid"
    except CallError as error:
        result = {"error": error.to_json()}
    except grpc.aio.AioRpcError as error:
        result = {"error": call_error_from_rpc(error).to_json()}
    except Exception as error:  # noqa: BLE001  a bug in one method must not end the connection
        incident = secrets.token_hex(4)
        log.error("internal error", incident=incident, method=message.method, exc_info=error)
        await connection.send_error(
            request_id, INTERNAL_ERROR, f"internal error, incident {incident}: see the gateway's log"
        )
        return "internal"
    await connection.send_result(request_id, result)
    return "error" if "error" in result else "ok"


async def _call(connection: RpcConnection, handler: Handler, params: Params) -> object:
    abort_id: int | None = getattr(params, "abort_id", None)
    work = handler(connection, params)
    return await (work if abort_id is None else connection.run_abortable(abort_id, work))
