"""Around every RPC: log context, span, time, the translation of errors, and a line in the audit log: who did what to
which sandbox, and what came of it.
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
# Where a message names what it is about; a stream's first message has that in a part of its own.
_NAMES = ("sandbox_id", "id", "id_or_slug", "volume", "name", "slug")
_PARTS = ("start", "open")
_MAX_NAME = 80


def target_of(message: Any) -> str:
    """Returns the sandbox, volume, image or template that a message is about; "" if it names none."""
    for part in (message, *(getattr(message, name, None) for name in _PARTS)):
        for name in _NAMES:
            value = getattr(part, name, "")
            if isinstance(value, str) and value:
                return printable(value[:_MAX_NAME])
    return ""


def _who(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Returns the caller: user and PID on the unix socket, the certificate's name on TCP."""
    known = context.auth_context()
    names = (*known.get("x509_common_name", ()), *known.get("x509_subject_alternative_name", ()))
    for name in filter(None, names):
        return printable(name.decode(errors="replace")[:_MAX_NAME])
    peer = context.peer()
    return peer.rpartition("/")[2] if peer.startswith("unix") else peer


class _Malformed:
    """A request that could not be read. gRPC's own answer to that is UNKNOWN, with a traceback in the log."""


def _reading(deserialize: Any) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Malformed()

    return read


class _Noted:
    """What a call turned out to be about."""

    def __init__(self, request: Any) -> None:
        self.target = target_of(request)

    def look_at(self, request: Any) -> Any:
        """Returns a request. :raises InvalidSpec: it is none."""
        if isinstance(request, _Malformed):
            raise InvalidSpec("the request is no protobuf message of its kind", reason="MALFORMED_REQUEST")
        self.target = self.target or target_of(request)
        return request

    async def each_of(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Yields the requests of a stream."""
        async for request in requests:
            yield self.look_at(request)

    def seen(self, request: Any) -> Any:
        """Returns a request, or the stream of them, as a handler is to get it. :raises InvalidSpec:"""
        return self.each_of(request) if hasattr(request, "__aiter__") else self.look_at(request)


@asynccontextmanager
async def _observed(
    method: str, context: grpc.aio.ServicerContext[Any, Any], noted: _Noted, *, audit: bool
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
        except Exception as error:  # noqa: BLE001  every error becomes a status here
            code, status = to_status(error)
            await context.abort_with_status(status)  # type: ignore[attr-defined]  # the stubs lack it
        finally:
            seconds = time.perf_counter() - start
            RPC_SECONDS.labels(method, code.name).observe(seconds)
            log.debug("rpc", code=code.name, ms=round(seconds * 1000, 2))
            if audit:
                log.info("audit", who=_who(context), target=noted.target, code=code.name, ms=round(seconds * 1000, 2))


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Wraps the four kinds of handlers. :param audit: whether each call gets a line in the audit log."""

    def __init__(self, *, audit: bool) -> None:
        self._audit = audit

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Called by grpc for each RPC."""
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
        noted = _Noted(request)
        async with _observed(name, context, noted, audit=audit):
            response = await inner(noted.seen(request), context)
            noted.target = noted.target or target_of(response)  # what was created
            return response

    return handle


def _streaming(name: str, inner: Any, *, audit: bool) -> Handler:
    # Not a generator itself: grpc drops a generator whose client left in the middle of a message, and its cleanup would
    # then run later, in another task and another context.
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        noted = _Noted(request)
        async with (
            _observed(name, context, noted, audit=audit),
            aclosing(inner(noted.seen(request), context)) as responses,
        ):
            async for response in responses:
                await context.write(response)

    return handle
