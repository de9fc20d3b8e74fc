"""Copies of a running sandbox: it stands still for as long as its memory is saved and its disk copied."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent.common.aio import run_to_completion
from agent.common.errors import InvalidSpec, InvalidState
from agent.common.model import State
from agent.common.telemetry import step
from agent.daemon.host.sparse_copy import copy_sparse
from agent.daemon.sandbox.machine import snapshot
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.machine.resources import create_empty_slots, grant_traversal
from agent.daemon.sandbox.state.record import Record
from agent.daemon.storage.disks import disk_error
from agent.daemon.storage.volumes import is_snapshot

MAX_COPIES = 64


def check(record: Record, count: int) -> None:
    """:raises InvalidSpec: so many copies are not made at once. :raises InvalidState: the sandbox cannot be copied."""
    if not 1 <= count <= MAX_COPIES:
        raise InvalidSpec(f"count is {count}; it must be from 1 to {MAX_COPIES}")
    if record.state not in (State.RUNNING, State.PAUSED):
        hint = "; resume it first" if record.state is State.SUSPENDED else ""
        raise InvalidState(f"sandbox {record.id} is {record.state}, not running{hint}", reason="SANDBOX_NOT_RUNNING")
    if record.spec.volumes or (record.spec.root and not is_snapshot(record.spec.root)):
        raise InvalidState(
            "a sandbox with volumes cannot be forked: each has one writer; copy them by snapshots instead",
            reason="FORK_HAS_VOLUMES",
        )


async def freeze(host: HostServices, parent: Record, machine: Machine, children: list[Record], directory: Path) -> None:
    """Saves the parent's machine, which then stands still, and gives each child its disk.

    :raises AgentError: it failed; directories of children may be left.
    """
    await snapshot.save(machine, directory)
    with step("fork.disks"):
        await run_to_completion(asyncio.to_thread(_copy_disks, host, parent, children))


def _copy_disks(host: HostServices, parent: Record, children: list[Record]) -> None:
    for child in children:
        disk = host.paths.disk(child.id)
        try:
            disk.parent.mkdir(mode=0o700, parents=True)
            grant_traversal(disk.parent, child.uid)
            copy_sparse(host.paths.disk(parent.id), disk)
        except OSError as error:
            raise disk_error(disk, error) from error
        create_empty_slots(host, child.id, int(child.shape["slots"]))
