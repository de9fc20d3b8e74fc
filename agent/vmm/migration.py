"""Snapshots by QEMU's migration to a file: device state alone, since the RAM is a file of its own (x-ignore-shared).

QEMU's docs/devel/migration: only one migration is allowed between two `cont`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent.errors import VmmError
from agent.vmm.qmp import Qmp

_STATE = "state"
_TIMEOUT_S = 30.0
_POLL_S = 0.001
_CAPABILITIES = [{"capability": "x-ignore-shared", "state": True}]


async def save(qmp: Qmp, directory: Path) -> None:
    """Writes the device state of a stopped VM into `directory`. :raises VmmError:"""
    await qmp.execute("migrate-set-capabilities", capabilities=_CAPABILITIES)
    await qmp.execute("migrate", uri=f"file:{directory / _STATE}")
    await _completed(qmp)


async def load(qmp: Qmp, directory: Path) -> None:
    """Gives a VM that was started with `-incoming defer` the device state in `directory`. :raises VmmError:"""
    await qmp.execute("migrate-set-capabilities", capabilities=_CAPABILITIES)
    await qmp.execute("migrate-incoming", uri=f"file:{directory / _STATE}")
    await _completed(qmp)


async def _completed(qmp: Qmp) -> None:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            while (answer := await qmp.execute("query-migrate")).get("status") != "completed":
                if answer.get("status") in ("failed", "cancelled"):
                    why = answer.get("error-desc") or "QEMU gave no reason"
                    raise VmmError(f"the snapshot failed: {why}", reason="SNAPSHOT_FAILED")
                await asyncio.sleep(_POLL_S)
    except TimeoutError as error:
        raise VmmError(f"the snapshot took over {_TIMEOUT_S:g} s", reason="SNAPSHOT_FAILED") from error
