"""Watches over a running machine: notices at once that its VM or its link is gone."""

from __future__ import annotations

import asyncio
from typing import Any

from agent.common.errors import AgentError
from agent.common.telemetry import log
from agent.daemon.sandbox.machine import guest_setup
from agent.daemon.sandbox.machine.machine import Machine


async def until_lost(running: Machine, sandbox_id: str, relink_timeout_s: float) -> AgentError:
    """Returns why the machine is of no more use: its VM ended, or its link was lost and could not be dialled again."""
    ended = asyncio.create_task(running.vm.wait())
    try:
        while True:
            waited: set[asyncio.Future[Any]] = {ended, running.channel.lost}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return guest_setup.vmm_ended(ended.result())
            log.warning("link lost", sandbox_id=sandbox_id, reason=running.channel.lost.result().message)
            try:
                await running.relink(relink_timeout_s)
            except AgentError as error:
                return error
    finally:
        ended.cancel()
