"""Saved VMs: a sandbox on the disk alone, and how a machine is made of it again.

A disk goes on from where its VM's memory was saved or it is of no use, so the order is: a VM is saved while it stands
still, the record says SUSPENDED, and only then the VM ends; the VM that is made of it stands still until the record
says RUNNING. An agent that dies in between leaves either a VM to adopt or a whole save.
"""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import AsyncExitStack
from pathlib import Path

from agent.common.aio import to_the_end
from agent.common.atomic_file import publish_directory
from agent.common.errors import HostError, InvalidState, ResourceExhausted
from agent.common.telemetry import step
from agent.daemon.host.sparse_copy import NO_SPACE
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.machine.resources import (
    Host,
    make_cgroup,
    make_run_directory,
    push_state_removal,
    remove_tree,
)
from agent.daemon.sandbox.machine.vm_shape import Shape, disks_of, vm_spec
from agent.daemon.sandbox.state.record import Record
from agent.daemon.storage.images import Image

_DRAFT = ".draft"


async def save(machine: Machine, directory: Path) -> None:
    """Saves a machine, which stands still afterwards, into a directory that is there whole or not at all.

    :raises AgentError: it failed; the machine stands still, too.
    """
    draft = directory.with_name(directory.name + _DRAFT)
    await to_the_end(asyncio.to_thread(remove_tree, draft))
    try:
        draft.mkdir(mode=0o700, parents=True)
        with step("vmm.save"):
            await machine.save(draft)
        with step("vmm.saved"):
            await to_the_end(asyncio.to_thread(publish_directory, draft, directory))
    except BaseException as error:
        await to_the_end(asyncio.to_thread(remove_tree, draft))
        if isinstance(error, OSError):
            if error.errno in NO_SPACE:
                raise _no_space(directory) from error
            raise HostError(f"cannot save into {directory}: {error.strerror}", reason="STATE_UNAVAILABLE") from error
        if "No space left" in str(error):
            raise _no_space(directory) from error
        raise


def _no_space(directory: Path) -> ResourceExhausted:
    return ResourceExhausted(
        f"no space left to save a sandbox's memory in {directory.parent}: free some, or delete sandboxes",
        reason="DISK_FULL",
    )


async def restore(host: Host, record: Record, image: Image, directory: Path) -> Machine:
    """Returns a machine made of what `save` wrote, which stands still; its disk is in its place.

    :raises AgentError: it failed; nothing but disk and directory is left.
    """
    shape = Shape(**record.shape)
    vmm = await host.driver.probe()
    if shape.snapshot_key != vmm.snapshot_key:
        raise InvalidState(
            f"the sandbox was saved by another VMM or CPU ({shape.snapshot_key}) than this node has now "
            f"({vmm.snapshot_key}): bring that back, or delete the sandbox",
            reason="SAVED_ELSEWHERE",
        )
    async with AsyncExitStack() as volatile, AsyncExitStack() as lasting:
        with step("directories"):
            make_run_directory(host, record.id, volatile)
        with step("cgroup"):
            cgroup = await make_cgroup(host, record.id, shape.vcpu_count, shape.memory_bytes, volatile)
        await host.network.make(record, volatile)
        disks = disks_of(host.volumes, record.spec)
        spec = vm_spec(host.settings, host.paths, record.id, shape, image, None, directory, disks, record.uid, cgroup)
        with step("vmm.restore"):
            vm = await host.driver.start(dataclasses.replace(spec, stands_still=True))
        volatile.push_async_callback(vm.stop)
        record.token = dict(vm.resume_token)
        push_state_removal(host, record.id, lasting)
        return Machine(vm, None, volatile.pop_all(), lasting.pop_all())
    raise AssertionError("unreachable: nothing above suppresses exceptions")
