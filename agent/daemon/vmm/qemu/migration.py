"""Save and restore a QEMU VM by migration to a file: device state alone (x-ignore-shared) or device state and RAM.

Source: QEMU's docs/devel/migration. Only one migration is allowed between two `cont`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent.common.errors import VmmError
from agent.daemon.vmm.qemu.qmp import Qmp

_STATE = "state"
FILES = (_STATE,)
_TIMEOUT_S = 30.0
_RAM_TIMEOUT_S = 600.0  # a slow disk may have to write tens of GiB
_RAM_BYTES_PER_S = 1 << 40  # the default, 128 MiB/s, is meant for networks
_POLL_S = 0.001
_ACTIVE = ("setup", "active", "device", "cancelling")


async def save(qmp: Qmp, directory: Path, *, ram: bool) -> None:
    """Write the state of a stopped VM into `directory`.

    :param ram: include the RAM; False for a VM whose RAM is a shared file.
    :raises VmmError: QEMU refused, failed, or took too long (SNAPSHOT_FAILED).
    """
    await _ignore_shared(qmp, wanted=not ram)
    await qmp.execute("migrate-set-parameters", max_bandwidth=_RAM_BYTES_PER_S)
    await qmp.execute("migrate", uri=f"file:{directory / _STATE}")
    await _completed(qmp, _RAM_TIMEOUT_S if ram else _TIMEOUT_S)


async def load(qmp: Qmp, directory: Path, *, ram: bool) -> None:
    """Restore the state in `directory` into a VM that was started with `-incoming defer`.

    :param ram: as it was for `save`.
    :raises VmmError: QEMU refused, failed, or took too long (SNAPSHOT_FAILED).
    """
    await _ignore_shared(qmp, wanted=not ram)
    await qmp.execute("migrate-incoming", uri=f"file:{directory / _STATE}")
    await _completed(qmp, _RAM_TIMEOUT_S if ram else _TIMEOUT_S)


async def cancel(qmp: Qmp) -> None:
    """Cancel a save in progress, if any: an earlier agent may have died in the middle of it.

    :raises VmmError: QEMU did not answer, or refused.
    """
    await qmp.execute("migrate_cancel")
    async with asyncio.timeout(_TIMEOUT_S):
        while (await qmp.execute("query-migrate")).get("status") in _ACTIVE:  # noqa: ASYNC110  QMP cannot wait for it
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
