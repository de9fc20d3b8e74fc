"""Methods on the network: expose a port, and fetch from inside the sandbox."""

from __future__ import annotations

import contextlib
import zlib

import grpc
import httpcore

from agent.common.api_client import reason_of
from agent.gateway.errors import CallError, process_gone
from agent.gateway.jsonrpc.connection import RpcConnection
from agent.gateway.jsonrpc.streams import OutboundStream
from agent.gateway.methods import http_client
from agent.gateway.methods.file_io import stream_pieces
from agent.gateway.methods.params import network_params
from agent.gateway.nodes.guest_http import connection_pool
from agent.gateway.sandboxes.session import Session
from sandboxd.v1 import network_pb2

# A socket that is bound to all addresses is reached at the loopback address.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  looked up, not bound


async def wait_for_listener(session: Session, pid: int) -> network_pb2.Listener | None:
    """Wait until a process listens on a TCP port and return its address, or None if the process exits first.

    :raises CallError: there is no such process.
    :raises grpc.aio.AioRpcError: the call failed.
    """
    process_id = await session.process_id(pid)
    request = network_pb2.WaitForListenerRequest(sandbox_id=session.sandbox_id, process_id=process_id)
    try:
        return await session.api.network.WaitForListener(request)
    except grpc.aio.AioRpcError as error:
        if reason_of(error) == "PROCESS_EXITED":
            return None
        raise


async def expose_http(connection: RpcConnection, params: network_params.Expose) -> object:
    """Set the target of a domain that REST has reserved: a port, or the listening port of a process."""
    session = connection.session
    if params.port is not None:
        session.exposures.bind(params.domain, session.sandbox_id, port=params.port)
    elif params.pid is not None:
        process_id = await session.process_id(params.pid)
        session.exposures.bind(params.domain, session.sandbox_id, process_id=process_id)
    else:
        raise CallError("TypeError", "port or pid must be given")
    return None


async def fetch(connection: RpcConnection, params: network_params.Fetch) -> object:
    """Send an HTTP request and return the head of the response; the body is a stream."""
    http_client.parse_target(params.url)
    session = connection.session
    fixed = None
    if params.pid is not None:
        listener = await wait_for_listener(session, params.pid)
        if listener is None:
            raise process_gone(params.pid)
        fixed = (_LOOPBACK.get(listener.host, listener.host), listener.port)
    async with contextlib.AsyncExitStack() as stack:
        pool = await stack.enter_async_context(await connection_pool(session.api, session.sandbox_id, fixed))
        body = None
        if params.body_stream_id is not None:
            body = stream_pieces(await stack.enter_async_context(connection.streams.inbound(params.body_stream_id)))
        response = await http_client.send(pool, stack, params, body, plain=fixed is not None)
        head = http_client.response_head(response)
        if response.status in http_client.NO_BODY or params.method == "HEAD":
            return {**head, "bodyStreamId": None}
        stream = connection.streams.outbound()
        connection.spawn(_relay_body(connection, response, stream, stack.pop_all()))
        return {**head, "bodyStreamId": stream.id}


async def _relay_body(
    connection: RpcConnection, response: httpcore.Response, stream: OutboundStream, stack: contextlib.AsyncExitStack
) -> None:
    async with stack:
        try:
            async for data in http_client.body_pieces(response):
                if not stream.open:
                    break
                await stream.write(data)
            await stream.end()
        except (*http_client.CLIENT_ERRORS, zlib.error) as error:
            await stream.fail(CallError("TypeError", f"error reading a body from connection: {error}"))
        except CallError as error:  # of the request's body
            await stream.fail(error)
        finally:
            connection.streams.remove(stream)
