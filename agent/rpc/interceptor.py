"""Around every RPC: log context, span, time, and the translation of errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import structlog

from agent.rpc.status import to_status
from agent.telemetry import RPC_SECONDS, log, tracer

Handler = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Any]


@asynccontextmanager
async def _observed(method: str, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    start = time.perf_counter()
    code = grpc.StatusCode.OK
    with structlog.contextvars.bound_contextvars(rpc=method, peer=context.peer()):
        try:
            with tracer.start_as_current_span(method):
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


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Wraps the four kinds of handlers."""

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
        name = method.rpartition("/")[2]
        serializers = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(_streaming(name, handler.stream_stream), **serializers)
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(_unary(name, handler.stream_unary), **serializers)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_streaming(name, handler.unary_stream), **serializers)
        return grpc.unary_unary_rpc_method_handler(_unary(name, handler.unary_unary), **serializers)


def _unary(name: str, inner: Any) -> Handler:
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async with _observed(name, context):
            return await inner(request, context)

    return handle


def _streaming(name: str, inner: Any) -> Handler:
    # Not a generator itself: grpc drops a generator whose client left in the middle of a message, and its cleanup would
    # then run later, in another task and another context.
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        async with _observed(name, context), aclosing(inner(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    return handle
