"""Wrap every RPC: bind the log context, open a span, measure the time, translate errors, write the audit log.

An audit line has the caller, the call, the sandbox (or volume, image, template) and the status code.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from agent.common.errors import InvalidSpec
from agent.common.telemetry import RPC_SECONDS, log, remote_parent, tracer
from agent.daemon.rpc.convert.guest_values import printable
from agent.daemon.rpc.status import to_status

Handler = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Any]
# Fields that identify the object of a call; in the first message of a stream they are in one of _PARTS.
_NAMES = ("sandbox_id", "id", "id_or_slug", "volume", "name", "slug")
_PARTS = ("start", "open")
_MAX_NAME = 80


def target_of(message: Any) -> str:
    """Return the id or name of the sandbox, volume, image or template in a message; "" without one."""
    for part in (message, *(getattr(message, name, None) for name in _PARTS)):
        for name in _NAMES:
            value = getattr(part, name, "")
            if isinstance(value, str) and value:
                return printable(value[:_MAX_NAME])
    return ""


def _who(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Return the caller: UID and PID on the unix socket, the name in the client certificate on TCP."""
    known = context.auth_context()
    names = (*known.get("x509_common_name", ()), *known.get("x509_subject_alternative_name", ()))
    for name in filter(None, names):
        return printable(name.decode(errors="replace")[:_MAX_NAME])
    peer = context.peer()
    return peer.rpartition("/")[2] if peer.startswith("unix") else peer


class _Malformed:
    """Stands for a request that cannot be parsed. gRPC itself would answer UNKNOWN and log a traceback."""


def _reading(deserialize: Any) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Malformed()

    return read


class _CallTarget:
    """The object of a call, found in its requests; refuses malformed requests."""

    def __init__(self, request: Any) -> None:
        self.name = target_of(request)

    def inspect(self, request: Any) -> Any:
        """Take the target from a request, and return the request.

        :raises InvalidSpec: the request is malformed.
        """
        if isinstance(request, _Malformed):
            raise InvalidSpec(
                "the request cannot be parsed as the protobuf message of this call", reason="MALFORMED_REQUEST"
            )
        self.name = self.name or target_of(request)
        return request

    async def inspect_each(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Inspect and yield the requests of a stream."""
        async for request in requests:
            yield self.inspect(request)

    def inspected(self, request: Any) -> Any:
        """Return the request, or the stream of requests, for the handler.

        :raises InvalidSpec: the request is malformed; a stream raises it later.
        """
        return self.inspect_each(request) if hasattr(request, "__aiter__") else self.inspect(request)


@asynccontextmanager
async def _observed(
    method: str, context: grpc.aio.ServicerContext[Any, Any], target: _CallTarget, *, audit: bool
) -> AsyncIterator[None]:
    start = time.perf_counter()
    code = grpc.StatusCode.OK
    with structlog.contextvars.bound_contextvars(rpc=method, peer=context.peer()):
        try:
            with tracer.start_as_current_span(method, context=remote_parent(context.invocation_metadata())):
                yield
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001  all errors become a status here
            code, status = to_status(error)
            await context.abort_with_status(status)  # type: ignore[attr-defined]  # the stubs lack it
        finally:
            seconds = time.perf_counter() - start
            RPC_SECONDS.labels(method, code.name).observe(seconds)
            log.debug("rpc", code=code.name, ms=round(seconds * 1000, 2))
            if audit:
                log.info("audit", who=_who(context), target=target.name, code=code.name, ms=round(seconds * 1000, 2))


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Wraps the handlers of all calls.

    :param audit: write a line to the audit log for each call.
    """

    def __init__(self, *, audit: bool) -> None:
        self._audit = audit

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the wrapped handler of a call; gRPC calls this for each RPC."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or method.startswith("/grpc."):
            return handler
        name, audit = method.rpartition("/")[2], self._audit
        serializers = {
            "request_deserializer": _reading(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                _streaming(name, handler.stream_stream, audit=audit), **serializers
            )
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(_unary(name, handler.stream_unary, audit=audit), **serializers)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _streaming(name, handler.unary_stream, audit=audit), **serializers
            )
        return grpc.unary_unary_rpc_method_handler(_unary(name, handler.unary_unary, audit=audit), **serializers)


def _unary(name: str, inner: Any, *, audit: bool) -> Handler:
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        target = _CallTarget(request)
        async with _observed(name, context, target, audit=audit):
            response = await inner(target.inspected(request), context)
            target.name = target.name or target_of(response)  # a create names its object in the response
            return response

    return handle


def _streaming(name: str, inner: Any, *, audit: bool) -> Handler:
    # Not a generator itself: gRPC drops a generator when its client disconnects while a message is written, and the
    # generator's cleanup would then run later, in another task and another context.
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        target = _CallTarget(request)
        async with (
            _observed(name, context, target, audit=audit),
            aclosing(inner(target.inspected(request), context)) as responses,
        ):
            async for response in responses:
                await context.write(response)

    return handle
