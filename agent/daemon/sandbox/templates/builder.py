"""Build one template: boot a VM whose RAM is a file, let its guest prepare itself, snapshot it, and test one clone."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from agent.common.errors import AgentError, HostError, ResourceExhausted, VmmError
from agent.common.model import new_sandbox_id
from agent.daemon.guestlink.channel import Channel
from agent.daemon.host.sparse_copy import NO_SPACE
from agent.daemon.sandbox.machine import guest_setup
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.resources import allocate, create_disks, remove_tree, start_vm
from agent.daemon.sandbox.machine.vm_plan import MemorySource, SharedMemory, TemplateMemory, VmPlan
from agent.daemon.sandbox.machine.vm_shape import Shape
from agent.daemon.sandbox.templates import files
from agent.daemon.sandbox.templates.files import Template
from agent.daemon.storage.images import Image
from agent.daemon.vmm.driver import Vm

# The guest notices that its link is down, and finishes its work after its last answer.
_SETTLE_S = 0.2
_FULL_BYTES = 1 << 20  # a file system with less room than this is full


async def build(host: HostServices, shape: Shape, image: Image, draft: Path, path: Path) -> Template:
    """Return a new template at `path`, made in `draft` and renamed once it is complete.

    :raises ResourceExhausted: no space is left for the template.
    :raises AgentError: the VM or its guest failed. Nothing is left.
    """
    try:
        return await _build(host, shape, image, draft, path)
    except VmmError as error:
        # RAM is a sparse file: a guest that touches a page for which there is no room kills its VMM (SIGBUS).
        if _is_full(draft):
            raise _no_space(path.parent) from error
        raise
    except OSError as error:
        if error.errno in NO_SPACE:
            raise _no_space(path.parent) from error
        raise HostError(f"cannot make a template in {path.parent}: {error}", reason="TEMPLATE_FAILED") from error
    finally:
        await asyncio.shield(asyncio.to_thread(remove_tree, draft))


def _is_full(directory: Path) -> bool:
    facts = os.statvfs(directory)
    return facts.f_bavail * facts.f_frsize < _FULL_BYTES


def _no_space(directory: Path) -> ResourceExhausted:
    return ResourceExhausted(
        f"no space left for a template in {directory}: free some, or lower templates.budget_bytes", reason="DISK_FULL"
    )


async def _build(host: HostServices, shape: Shape, image: Image, draft: Path, path: Path) -> Template:
    ram, vmm = draft / files.RAM, draft / files.VMM
    vmm.mkdir(parents=True)
    with ram.open("xb") as file:
        os.ftruncate(file.fileno(), shape.memory_bytes)
    async with _running(host, shape, image, SharedMemory(ram), draft) as (vm, channel):
        emulated = (await host.driver.probe()).accelerator == "tcg"
        await guest_setup.prepare(channel, emulated=emulated)
        await channel.aclose()
        await asyncio.sleep(_SETTLE_S)
        await vm.snapshot(vmm)
    await asyncio.to_thread(files.write_manifest, draft, shape, image.name, time.time())
    async with _running(host, shape, image, TemplateMemory(ram, vmm), draft) as (_, channel):
        await channel.call("sys.hello")
    return await asyncio.to_thread(files.publish, draft, path)


@asynccontextmanager
async def _running(
    host: HostServices, shape: Shape, image: Image, memory: MemorySource, draft: Path
) -> AsyncIterator[tuple[Vm, Channel]]:
    """Run a VM and connect to its guest; leaving the context ends the VM and removes its resources.

    The VM has the id of a sandbox, so that the next agent finds and removes its resources if this agent dies.
    """
    uid = host.uids.reserve()
    try:
        plan = VmPlan(
            new_sandbox_id(), shape, image, memory, uid=uid, save_root=draft,
            console_limit_bytes=host.settings.vmm.console_limit_bytes,
        )  # fmt: skip
        async with allocate(host, plan) as allocated:
            await create_disks(host, plan)
            vm = await start_vm(host, plan, allocated.cgroup, allocated.volatile)
            try:
                timeout_s = host.settings.sandbox.boot_timeout_s
                channel = await guest_setup.connect(vm, fresh=True, timeout_s=timeout_s)
                allocated.volatile.push_async_callback(channel.aclose)
                yield vm, channel
            except AgentError as error:
                guest_setup.add_console(error, vm)
                raise
    finally:
        host.uids.release(uid)
