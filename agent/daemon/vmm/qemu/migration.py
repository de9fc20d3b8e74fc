"""Snapshots by QEMU's migration to a file: device state alone where the RAM is a shared file of its own
(x-ignore-shared), or device state and RAM.

QEMU's docs/devel/migration: only one migration is allowed between two `cont`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent.common.errors import VmmError
from agent.daemon.vmm.qemu.qmp import Qmp

_STATE = "state"
FILES = (_STATE,)
_TIMEOUT_S = 30.0
_RAM_TIMEOUT_S = 600.0  # for what a slow disk takes to write tens of GiB
_RAM_BYTES_PER_S = 1 << 40  # QEMU's own limit is 128 MiB/s: it thinks of networks
_POLL_S = 0.001
_UNDER_WAY = ("setup", "active", "device", "cancelling")


async def save(qmp: Qmp, directory: Path, *, ram: bool) -> None:
    """Writes the state of a stopped VM into `directory`. :raises VmmError:

    :param ram: with the RAM, unless that is a shared file.
    """
    await _ignore_shared(qmp, wanted=not ram)
    await qmp.execute("migrate-set-parameters", max_bandwidth=_RAM_BYTES_PER_S)
    await qmp.execute("migrate", uri=f"file:{directory / _STATE}")
    await _completed(qmp, _RAM_TIMEOUT_S if ram else _TIMEOUT_S)


async def load(qmp: Qmp, directory: Path, *, ram: bool) -> None:
    """Gives a VM that was started with `-incoming defer` the state in `directory`, saved likewise. :raises VmmError:"""
    await _ignore_shared(qmp, wanted=not ram)
    await qmp.execute("migrate-incoming", uri=f"file:{directory / _STATE}")
    await _completed(qmp, _RAM_TIMEOUT_S if ram else _TIMEOUT_S)


async def give_up(qmp: Qmp) -> None:
    """Ends a save that is under way, if any: an agent may have died in the middle of it. :raises VmmError:"""
    await qmp.execute("migrate_cancel")
    async with asyncio.timeout(_TIMEOUT_S):
        while (await qmp.execute("query-migrate")).get("status") in _UNDER_WAY:  # noqa: ASYNC110  QMP has no other way
            await asyncio.sleep(_POLL_S)


async def _ignore_shared(qmp: Qmp, *, wanted: bool) -> None:
    await qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": wanted}])


async def _completed(qmp: Qmp, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while (answer := await qmp.execute("query-migrate")).get("status") != "completed":
                if answer.get("status") in ("failed", "cancelled"):
                    why = answer.get("error-desc") or "QEMU gave no reason"
                    raise VmmError(f"the snapshot failed: {why}", reason="SNAPSHOT_FAILED")
                await asyncio.sleep(_POLL_S)
    except TimeoutError as error:
        raise VmmError(f"the snapshot took over {timeout_s:g} s", reason="SNAPSHOT_FAILED") from error
