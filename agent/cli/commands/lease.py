"""Keeps the lease of a sandbox alive for as long as the command runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from agent.cli.errors import warn
from agent.common.api_client import Api

if TYPE_CHECKING:
    from sandboxd.v1.sandbox_pb2 import KeepAliveRequest

_RENEWALS = 3  # in the time of one lease: two may be lost


async def hold(api: Api, sandbox_id: str, lease_s: float) -> None:
    """Renews until cancelled, then deletes the sandbox.

    :raises grpc.aio.AioRpcError: the sandbox is gone, or the daemon was away for a whole lease.
    """
    from agent.cli.commands.sandbox import delete

    try:
        await _renew(api, sandbox_id, lease_s)
    except asyncio.CancelledError:
        await delete(api, sandbox_id)
        raise


async def _renew(api: Api, sandbox_id: str, lease_s: float) -> None:
    import grpc

    loop = asyncio.get_running_loop()
    renewed = loop.time()
    while True:
        try:
            async for _ in api.sandboxes.KeepAlive(_beats(sandbox_id, lease_s)):
                renewed = loop.time()
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or loop.time() - renewed > lease_s:
                raise
            warn("the daemon is away; trying again until the lease has lapsed")
        await asyncio.sleep(lease_s / _RENEWALS)


async def _beats(sandbox_id: str, lease_s: float) -> AsyncIterator[KeepAliveRequest]:
    from sandboxd.v1 import sandbox_pb2

    while True:
        yield sandbox_pb2.KeepAliveRequest(id=sandbox_id)
        await asyncio.sleep(lease_s / _RENEWALS)
