"""Host resources of one VM: directories, cgroup, network namespace, disks; made from a `VmPlan`, removed by id.

Two cleanup stacks remove them: `volatile` the resources that only a running VM needs, `lasting` the state directory,
which survives a suspension.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from agent.common.aio import run_to_completion
from agent.common.errors import HostError
from agent.common.telemetry import step
from agent.daemon.host.cgroup import CgroupLimits, block_device
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.vm_plan import (
    FreshDisk,
    FreshMemory,
    SavedMemory,
    SharedMemory,
    SnapshotDisk,
    VmPlan,
    vm_spec,
)
from agent.daemon.sandbox.machine.vm_shape import SLOT_BYTES, Shape
from agent.daemon.vmm.driver import Vm

_TASKS, _TASKS_PER_CPU = 256, 4  # threads of a VMM: one for each CPU, and up to 64 for each disk's requests
# Of an emulator, most is the code that it has translated (1 GiB at most) and the maps of it.
_HEADROOM_BYTES = {"kvm": 512 << 20, "tcg": 1536 << 20}


# -- from a plan to a VM -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Allocation:
    """Resources that `allocate` made; leaving its context removes them unless `keep` was called.

    :param cgroup: the VMM's control group; None where this host has no cgroup v2.
    """

    cgroup: Path | None
    volatile: AsyncExitStack
    lasting: AsyncExitStack

    def keep(self) -> tuple[AsyncExitStack, AsyncExitStack]:
        """Return the stacks (volatile, lasting) that remove the resources; their owner is the caller from now on."""
        return self.volatile.pop_all(), self.lasting.pop_all()


@contextlib.asynccontextmanager
async def allocate(host: HostServices, plan: VmPlan) -> AsyncIterator[Allocation]:
    """Make directories, cgroup and network of a VM, in this order; on an error remove them in reverse.

    The state directory of a saved sandbox exists already and stays on an error.

    :raises AgentError: a resource could not be made; none is left.
    """
    async with AsyncExitStack() as lasting, AsyncExitStack() as volatile:
        with _step(plan, "directories"):
            if not isinstance(plan.memory, SavedMemory):
                state = host.paths.sandbox_state(plan.sandbox_id)
                _make_directory(state, lasting)
                grant_traversal(state, plan.uid)
            _make_directory(host.paths.sandbox_run(plan.sandbox_id), volatile)
        with _step(plan, "cgroup"):
            cgroup = await _make_cgroup(host, plan, volatile)
        if plan.record is None:
            await host.network.make_bare(plan.sandbox_id, volatile)
        else:
            await host.network.make(plan.record, volatile)
        yield Allocation(cgroup, volatile, lasting)


async def create_disks(host: HostServices, plan: VmPlan) -> None:
    """Create the data disk, in place of the disk of a failed attempt, and the empty disks of unused volume slots.

    :raises AgentError: no space is left, or a disk cannot be made.
    """
    with _step(plan, "disk"):
        disk = host.paths.disk(plan.sandbox_id)
        match plan.data_disk:
            case FreshDisk(size_bytes):
                disk.unlink(missing_ok=True)
                await run_to_completion(host.disks.make_disk(disk, size_bytes))
            case SnapshotDisk(snapshot):
                disk.unlink(missing_ok=True)
                await run_to_completion(host.volumes.copy(snapshot, disk))
        create_empty_slots(host, plan.sandbox_id, plan.shape.slots)


async def start_vm(host: HostServices, plan: VmPlan, cgroup: Path | None, stack: AsyncExitStack) -> Vm:
    """Start the VM of a plan whose resources exist; `stack` ends it.

    :raises VmmError: the VMM did not start; the resources stay.
    """
    with _step(plan, "vmm.start" if isinstance(plan.memory, FreshMemory | SharedMemory) else "vmm.restore"):
        vm = await host.driver.start(vm_spec(plan, host.paths, cgroup))
        stack.push_async_callback(vm.stop)
    return vm


def _step(plan: VmPlan, name: str) -> contextlib.AbstractContextManager[None]:
    """Time a step of a sandbox; the VM of a template is timed as a whole by its builder (`template.make`)."""
    return contextlib.nullcontext() if plan.record is None else step(name)


async def _make_cgroup(host: HostServices, plan: VmPlan, stack: AsyncExitStack) -> Path | None:
    accelerator = (await host.driver.probe()).accelerator
    group = host.cgroups.make(plan.sandbox_id, _cgroup_limits(host, plan.shape, accelerator))
    stack.push_async_callback(asyncio.to_thread, host.cgroups.remove, plan.sandbox_id)
    return group


def _cgroup_limits(host: HostServices, shape: Shape, accelerator: str) -> CgroupLimits:
    settings, sandbox = host.settings.cgroups, host.settings.sandbox
    headroom_bytes = settings.memory_headroom_bytes or _HEADROOM_BYTES[accelerator]
    return CgroupLimits(
        cpus=shape.vcpu_count + settings.cpu_headroom,
        weight=100 * shape.vcpu_count,
        memory_bytes=shape.memory_bytes + headroom_bytes,
        tasks=_TASKS + _TASKS_PER_CPU * shape.vcpu_count,
        device=block_device(host.paths.state_dir),
        io_bytes=sandbox.disk_bytes_per_s,
        io_operations=sandbox.disk_operations_per_s,
    )


def _make_directory(path: Path, stack: AsyncExitStack) -> None:
    try:
        path.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise HostError(f"cannot make {path}: {error.strerror}", reason="STATE_UNAVAILABLE") from error
    stack.push_async_callback(asyncio.to_thread, remove_tree, path)


def grant_traversal(directory: Path, uid: int | None) -> None:
    """Let a VMM that runs as `uid` reach files below a directory whose names it knows; None: nothing to do.

    :raises HostError: owner or mode of the directory cannot be changed.
    """
    if uid is None:
        return
    try:
        os.chown(directory, -1, uid)
        directory.chmod(0o710)
    except OSError as error:
        raise HostError(
            f"cannot open {directory} to user {uid}: {error.strerror}", reason="STATE_UNAVAILABLE"
        ) from error


def create_empty_slots(host: HostServices, sandbox_id: str, count: int) -> None:
    """Create the empty disks that fill volume slots without a volume. Idempotent.

    :raises HostError: a file cannot be made.
    """
    for slot in range(count):
        path = host.paths.empty_slot(sandbox_id, slot)
        try:
            with path.open("xb") as file:
                file.truncate(SLOT_BYTES)
        except FileExistsError:
            continue  # made for a clone that failed
        except OSError as error:
            raise HostError(f"cannot make {path}: {error.strerror}", reason="STATE_UNAVAILABLE") from error


# -- removal by name ---------------------------------------------------------------------------------------------------


async def remove(host: HostServices, sandbox_id: str) -> int:
    """Remove everything that a sandbox has on this host, by its id alone. Idempotent.

    :return: the number of processes that had to be killed.
    :raises HostError: something cannot be removed; all else has been.
    """
    async with AsyncExitStack() as stack:
        push_state_removal(host, sandbox_id, stack)
        return await remove_volatile(host, sandbox_id)
    raise AssertionError("unreachable: nothing above suppresses exceptions")


async def remove_volatile(host: HostServices, sandbox_id: str) -> int:
    """Remove everything of a sandbox but its state directory; otherwise as `remove`."""
    killed = await asyncio.to_thread(kill_strays, host, sandbox_id)
    async with AsyncExitStack() as stack:
        push_volatile_removal(host, sandbox_id, stack)
    return killed


def push_volatile_removal(host: HostServices, sandbox_id: str, stack: AsyncExitStack) -> None:
    """Make `stack` remove network, cgroup and run directory of a sandbox; missing ones are no error."""
    stack.push_async_callback(asyncio.to_thread, remove_tree, host.paths.sandbox_run(sandbox_id))
    # Before the directory: recovery finds a sandbox by its directories.
    stack.push_async_callback(asyncio.to_thread, host.cgroups.remove, sandbox_id)
    stack.push_async_callback(host.network.remove, sandbox_id)


def push_state_removal(host: HostServices, sandbox_id: str, stack: AsyncExitStack) -> None:
    """Make `stack` remove the state directory of a sandbox; a missing one is no error."""
    stack.push_async_callback(asyncio.to_thread, remove_tree, host.paths.sandbox_state(sandbox_id))


def kill_strays(host: HostServices, sandbox_id: str) -> int:
    """Kill the processes of a sandbox that no record names; return their number. Blocks.

    A VMM and its helpers carry their sandbox's directories in their arguments, and no other program of this host does.
    """
    marks = (f"{host.paths.sandbox_run(sandbox_id)}/", f"{host.paths.sandbox_state(sandbox_id)}/")
    strays = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if any(mark in words for mark in marks):
            strays.append(process)
    for process in strays:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return len(strays)


def remove_tree(path: Path) -> None:
    """Remove a directory and its content; a missing one is no error. Blocks.

    :raises HostError: it cannot be removed.
    """
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"cannot remove {path}: {error.strerror}; remove it by hand", reason="REMOVE_FAILED") from error
