"""Lease of a sandbox whose lifetime is that of its client's connection: renewed meanwhile, deleted afterwards."""

from __future__ import annotations

import asyncio

import grpc
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_fixed

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

    After any other failure the lease is renewed again 1 s later: a sandbox must not end while its client is connected.

    :param max_lifetime_s: delete the sandbox after this time; 0 means no limit.
    """
    retrying = AsyncRetrying(
        retry=retry_if_exception(_may_be_renewed_later),
        wait=wait_fixed(_RETRY_S),
        before_sleep=lambda state: _log_failure(session, state),
        reraise=True,
    )
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


def _may_be_renewed_later(error: BaseException) -> bool:
    """Return whether to try again: no cancellation, and no answer that says that the sandbox has no lease."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code() not in _NO_LEASE
    return isinstance(error, Exception)


def _log_failure(session: Session, state: RetryCallState) -> None:
    """Log a failure, except an end of the stream, which a restart of the node causes each second."""
    error = state.outcome.exception() if state.outcome is not None else None
    if not isinstance(error, grpc.aio.AioRpcError):
        log.error("cannot renew lease", sandbox_id=session.sandbox_id, error=repr(error))


async def delete_if_leased(session: Session) -> None:
    """Delete the sandbox, unless it has got a fixed expiry instead of its lease."""
    try:
        found = await session.api.sandboxes.GetSandbox(pb.GetSandboxRequest(id=session.sandbox_id))
    except grpc.aio.AioRpcError:
        return
    if found.lifetime.HasField("lease"):
        await delete(session.node, session.sandbox_id)
