"""Save a VM to disk, and restore a machine from what was saved: suspended and forked sandboxes.

A data disk may only be used together with the memory that was saved at the same moment. Hence the order: a VM is saved
while it is paused, the record says SUSPENDED, and only then the VM ends; the restored VM stays paused until the record
says RUNNING. An agent that dies in between leaves either a VM to adopt or a complete save.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent.common.aio import run_to_completion
from agent.common.atomic_file import publish_directory
from agent.common.errors import HostError, InvalidState, ResourceExhausted
from agent.common.telemetry import step
from agent.daemon.host.sparse_copy import NO_SPACE
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.machine.resources import allocate, push_state_removal, remove_tree, start_vm
from agent.daemon.sandbox.machine.vm_plan import SavedMemory, sandbox_plan
from agent.daemon.sandbox.machine.vm_shape import Shape
from agent.daemon.sandbox.state.record import Record
from agent.daemon.storage.images import Image

_DRAFT = ".draft"


async def save(machine: Machine, directory: Path) -> None:
    """Save a machine into `directory`, which appears complete or not at all. The machine is paused afterwards.

    :raises ResourceExhausted: no space is left; the machine is paused all the same.
    :raises AgentError: the VMM or the file system failed; the machine is paused all the same.
    """
    draft = directory.with_name(directory.name + _DRAFT)
    await run_to_completion(asyncio.to_thread(remove_tree, draft))
    try:
        draft.mkdir(mode=0o700, parents=True)
        with step("vmm.save"):
            await machine.save(draft)
        with step("vmm.saved"):
            await run_to_completion(asyncio.to_thread(publish_directory, draft, directory))
    except BaseException as error:
        await run_to_completion(asyncio.to_thread(remove_tree, draft))
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


async def restore(host: HostServices, record: Record, image: Image, directory: Path) -> Machine:
    """Return a paused machine restored from what `save` wrote; the data disk is in its place already.

    :raises InvalidState: another VMM or CPU saved the sandbox (SAVED_ELSEWHERE).
    :raises AgentError: a resource or the VMM failed; nothing but data disk and `directory` is left.
    """
    shape = Shape(**record.shape)
    vmm = await host.driver.probe()
    if shape.snapshot_key != vmm.snapshot_key:
        raise InvalidState(
            f"the sandbox was saved by another VMM or CPU ({shape.snapshot_key}) than this node has now "
            f"({vmm.snapshot_key}): bring that back, or delete the sandbox",
            reason="SAVED_ELSEWHERE",
        )
    plan = sandbox_plan(host, record, image, shape, SavedMemory(directory))
    async with allocate(host, plan) as allocated:
        vm = await start_vm(host, plan, allocated.cgroup, allocated.volatile)
        record.token = dict(vm.resume_token)
        push_state_removal(host, record.id, allocated.lasting)  # only now: a failure keeps the saved state
        return Machine(vm, None, *allocated.keep())
    raise AssertionError("unreachable: nothing above suppresses exceptions")
