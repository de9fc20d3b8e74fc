"""Lease of a sandbox whose lifetime is that of its client's connection: renewed meanwhile, deleted afterwards."""

from __future__ import annotations

import asyncio

import grpc
from tenacity import AsyncRetrying, retry_if_exception, wait_fixed

from agent.common.api_client import opened
from agent.common.telemetry import log
from agent.gateway.sandboxes.create_request import LEASE_S
from agent.gateway.sandboxes.creation import delete
from agent.gateway.sandboxes.session import Session
from sandboxd.v1 import sandbox_pb2 as pb

_RENEW_S = LEASE_S / 4
_RETRY_S = 1.0
_NO_LEASE = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND)


async def keep_alive(session: Session, max_lifetime_s: int) -> None:
    """Renew the sandbox's lease until cancelled, or until the sandbox has no lease any more.

    :param max_lifetime_s: delete the sandbox after this time; 0 means no limit.
    """
    retrying = AsyncRetrying(retry=retry_if_exception(_is_node_restarting), wait=wait_fixed(_RETRY_S), reraise=True)
    try:
        async with asyncio.timeout(max_lifetime_s or None):
            await retrying(_renew, session)
    except grpc.aio.AioRpcError:
        return
    except TimeoutError:
        log.info("session reached the maximum lifetime of its token", sandbox_id=session.sandbox_id)
        await delete(session.node, session.sandbox_id)


async def _renew(session: Session) -> None:
    """Renew the lease over one stream for ever.

    :raises grpc.aio.AioRpcError: the stream has ended.
    """
    call = opened(session.api.sandboxes.KeepAlive)
    try:
        while True:
            await call.write(pb.KeepAliveRequest(id=session.sandbox_id))
            await call.read()
            await asyncio.sleep(_RENEW_S)
    finally:
        call.cancel()


def _is_node_restarting(error: BaseException) -> bool:
    """Return whether the lease can be renewed later: the error does not say that the sandbox has none."""
    return isinstance(error, grpc.aio.AioRpcError) and error.code() not in _NO_LEASE


async def delete_if_leased(session: Session) -> None:
    """Delete the sandbox, unless it has got a fixed expiry instead of its lease."""
    try:
        found = await session.api.sandboxes.GetSandbox(pb.GetSandboxRequest(id=session.sandbox_id))
    except grpc.aio.AioRpcError:
        return
    if found.lifetime.HasField("lease"):
        await delete(session.node, session.sandbox_id)
