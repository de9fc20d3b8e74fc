"""Makes one template: boots a VM whose RAM is a file, lets its guest prepare itself, freezes it, and restores it
once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from agent.common.aio import to_the_end
from agent.common.errors import AgentError, HostError, ResourceExhausted, VmmError
from agent.common.model import new_sandbox_id
from agent.daemon.guestlink.channel import Channel
from agent.daemon.host.sparse_copy import NO_SPACE
from agent.daemon.sandbox.machine import guest_setup
from agent.daemon.sandbox.machine.resources import (
    Host,
    make_cgroup,
    make_run_directory,
    make_slots,
    make_state_directory,
    remove_tree,
)
from agent.daemon.sandbox.machine.vm_shape import TEMPLATE_DISK_BYTES, Shape, vm_spec
from agent.daemon.sandbox.templates import files
from agent.daemon.sandbox.templates.files import Template
from agent.daemon.storage.images import Image
from agent.daemon.vmm.driver import MemoryFile, Vm

# The guest notices that its link is down, and whatever it had to do after its last answer is done.
_SETTLE_S = 0.2
_FULL_BYTES = 1 << 20  # a file system with less room than this is full


async def make(host: Host, shape: Shape, image: Image, draft: Path, path: Path) -> Template:
    """Returns a new template at `path`, made in `draft` and renamed when it is whole.

    :raises AgentError: it failed; nothing is left.
    """
    try:
        return await _make(host, shape, image, draft, path)
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


async def _make(host: Host, shape: Shape, image: Image, draft: Path, path: Path) -> Template:
    (draft / files.VMM).mkdir(parents=True)
    ram = draft / files.RAM
    with ram.open("xb") as file:
        os.ftruncate(file.fileno(), shape.memory_bytes)
    async with _booted(host, shape, image, MemoryFile(ram, private=False), None) as (vm, channel):
        emulated = (await host.driver.probe()).accelerator == "tcg"
        await guest_setup.prepare(channel, emulated=emulated)
        await channel.aclose()
        await asyncio.sleep(_SETTLE_S)
        await vm.snapshot(draft / files.VMM)
    await asyncio.to_thread(files.write_manifest, draft, shape, image.name, time.time())
    async with _booted(host, shape, image, MemoryFile(ram, private=True), draft / files.VMM) as (_, channel):
        await channel.call("sys.hello")
    return await asyncio.to_thread(files.publish, draft, path)


@asynccontextmanager
async def _booted(
    host: Host, shape: Shape, image: Image, memory_file: MemoryFile, restore_from: Path | None
) -> AsyncIterator[tuple[Vm, Channel]]:
    """A VM with host resources of its own, under an id that a starting agent would clean up after, and its link."""
    sandbox_id = new_sandbox_id()
    async with AsyncExitStack() as stack:
        uid = host.uids.take()
        stack.callback(host.uids.give_back, uid)
        make_state_directory(host, sandbox_id, uid, stack)
        make_run_directory(host, sandbox_id, stack)
        cgroup = await make_cgroup(host, sandbox_id, shape.vcpu_count, shape.memory_bytes, stack)
        await to_the_end(host.disks.make_disk(host.paths.disk(sandbox_id), TEMPLATE_DISK_BYTES))
        make_slots(host, sandbox_id, shape.slots)
        await host.network.make_bare(sandbox_id, stack)
        spec = vm_spec(
            host.settings, host.paths, sandbox_id, shape, image, memory_file, restore_from, uid=uid, cgroup=cgroup
        )
        spec = dataclasses.replace(spec, save_root=memory_file.path.parent)
        vm = await host.driver.start(dataclasses.replace(spec, limits=type(spec.limits)()))
        stack.push_async_callback(vm.stop)
        try:
            timeout_s = host.settings.sandbox.boot_timeout_s
            channel = await guest_setup.connect(vm, fresh=True, timeout_s=timeout_s)
            stack.push_async_callback(channel.aclose)
            yield vm, channel
        except AgentError as error:
            error.message += guest_setup.console_note(vm)
            error.args = (error.message,)
            raise
