"""The running half of a sandbox: its host resources, its VM, its link. Made by numbered steps, unmade in reverse."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from agent.channel.channel import Channel
from agent.config import Settings
from agent.errors import AgentError, DeadlineExceeded, GuestUnreachable, HostError, InvalidState, VmmError
from agent.model import GATEWAY_IPV4, GATEWAY_IPV6, GUEST_IPV4, GUEST_IPV6, GUEST_MAC
from agent.net import netns
from agent.paths import Paths
from agent.rootfs import DiskMaker, Image
from agent.sandbox.record import Record
from agent.telemetry import log, step
from agent.vmm.api import DiskSpec, Driver, ExitInfo, LinkKind, NicSpec, Vm, VmSpec

_REDIAL_S = 0.05
_CONSOLE_TAIL_BYTES = 4000  # a panic says why before its registers and call trace
_KERNEL_ARGS = (
    "console=ttyS0 quiet loglevel=4 panic=-1 no_timer_check tsc=reliable random.trust_cpu=on 8250.nr_uarts=1 "
    # The crypto self-tests and synchronous RCU are the two largest waits of a boot without hardware help.
    "rcupdate.rcu_expedited=1 cryptomgr.notests"
)


@dataclass(frozen=True, slots=True)
class Host:
    """What machines are made with."""

    settings: Settings
    paths: Paths
    driver: Driver
    disks: DiskMaker


class Machine:
    """A VM that answers. `channel` changes when the link is dropped and dialled again."""

    def __init__(self, vm: Vm, channel: Channel, resources: AsyncExitStack) -> None:
        self.vm = vm
        self._channel = channel
        self._resources = resources
        self.guest_phases: list[tuple[str, float]] = []

    @property
    def channel(self) -> Channel:
        """The link as it is now; calls on a lost one raise GuestUnreachable."""
        return self._channel

    async def relink(self, timeout_s: float) -> None:
        """Dials again after the link was lost. :raises AgentError: no answer in time, or the VM ended."""
        await self._channel.aclose()
        self._channel = await connect(self.vm, fresh=False, timeout_s=timeout_s)

    async def aclose(self) -> None:
        """Ends the VM and removes every resource. Runs every step even if some fail; idempotent."""
        await self._channel.aclose()
        await self._resources.aclose()

    async def detach(self) -> None:
        """Leaves VM and resources to the next agent."""
        await self._channel.aclose()
        self._resources.pop_all()


async def boot(host: Host, record: Record, image: Image, save: Callable[[], Awaitable[None]]) -> Machine:
    """Makes the resources of `record` in order and returns a machine that is configured.

    :param save: writes the record; called once it says how to find the VM again.

    :raises AgentError: a step failed; nothing is left, and the message ends with the last lines of the console.
    """
    async with AsyncExitStack() as stack:
        with step("disk"):
            await _make_directories(host, record, stack)
            await _finish(host.disks.make_disk(host.paths.disk(record.id), record.spec.disk_bytes))
        with step("netns"):
            stack.push_async_callback(netns.remove, record.id)
            await _finish(netns.make(record.id))
        with step("vmm.start"):
            vm = await host.driver.start(_vm_spec(host, record, image))
            stack.push_async_callback(vm.stop)
            record.token = dict(vm.resume_token)
            await save()
        try:
            with step("guest.boot"):
                channel = await connect(vm, fresh=True, timeout_s=host.settings.sandbox.boot_timeout_s)
            stack.push_async_callback(channel.aclose)
            with step("guest.configure"):
                await _configure(channel, record)
        except AgentError as error:
            error.message += console_note(vm)
            error.args = (error.message,)
            raise
        return Machine(vm, channel, stack.pop_all())
    raise AssertionError("unreachable: nothing above suppresses exceptions")


async def _finish(work: Coroutine[Any, Any, None]) -> None:
    """Awaits work that a thread carries out, to its end even if cancelled: its removal must come after it."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # retrieved: the cancellation is what counts
        raise


async def adopt(host: Host, record: Record) -> Machine | None:
    """Returns the machine that an earlier agent left running, or None; then its resources are gone."""
    async with AsyncExitStack() as stack:
        push_removal(host, record.id, stack)
        vm = await host.driver.adopt(record.id, host.paths.sandbox_run(record.id), record.token)
        if vm is None:
            return None
        stack.push_async_callback(vm.stop)
        try:
            channel = await connect(vm, fresh=False, timeout_s=host.settings.sandbox.relink_timeout_s)
            hello = await channel.call("sys.hello")
        except AgentError as error:
            log.warning("a running VM does not answer", sandbox_id=record.id, error=error.message)
            return None
        if not hello.get("configured"):
            return None
        return Machine(vm, channel, stack.pop_all())
    raise AssertionError("unreachable: nothing above suppresses exceptions")


def kill_strays(host: Host, sandbox_id: str) -> int:
    """Ends processes that were started for a sandbox and never recorded; returns how many there were.

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


async def remove(host: Host, sandbox_id: str) -> int:
    """Removes all that a sandbox has on this host, by its name alone; returns how many processes it ended."""
    strays = await asyncio.to_thread(kill_strays, host, sandbox_id)
    async with AsyncExitStack() as stack:
        push_removal(host, sandbox_id, stack)
    return strays


def push_removal(host: Host, sandbox_id: str, stack: AsyncExitStack) -> None:
    """Makes `stack` remove all that a sandbox has on the host besides its VM; absence is success."""
    for path in (host.paths.sandbox_run(sandbox_id), host.paths.sandbox_state(sandbox_id)):
        stack.push_async_callback(asyncio.to_thread, _remove_tree, path)
    stack.push_async_callback(netns.remove, sandbox_id)


def _remove_tree(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"cannot remove {path}: {error.strerror}; remove it by hand", reason="REMOVE_FAILED") from error


async def _make_directories(host: Host, record: Record, stack: AsyncExitStack) -> None:
    for path in (host.paths.sandbox_run(record.id), host.paths.sandbox_state(record.id)):
        try:
            path.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise HostError(f"cannot make {path}: {error.strerror}", reason="STATE_UNAVAILABLE") from error
        stack.push_async_callback(asyncio.to_thread, _remove_tree, path)


def _vm_spec(host: Host, record: Record, image: Image) -> VmSpec:
    vmm = host.settings.vmm
    return VmSpec(
        id=record.id,
        vcpu_count=record.spec.vcpu_count,
        memory_bytes=record.spec.memory_bytes,
        kernel=image.kernel.path,
        initramfs=image.initramfs.path,
        cmdline=f"{_KERNEL_ARGS} sandboxd.root={image.root_format} sandboxd.link={vmm.link} {vmm.extra_kernel_args}",
        disks=(
            DiskSpec(image.root.path, "root", read_only=True),
            DiskSpec(host.paths.disk(record.id), "data", read_only=False),
        ),
        nic=NicSpec(netns.TAP, GUEST_MAC),
        netns=record.id,
        run_dir=host.paths.sandbox_run(record.id),
        link=LinkKind(vmm.link),
        console_limit_bytes=vmm.console_limit_bytes,
    )


async def connect(vm: Vm, *, fresh: bool, timeout_s: float) -> Channel:
    """Dials until the guest answers. :raises VmmError: the VM ended. :raises DeadlineExceeded: no answer in time."""
    dialling = asyncio.create_task(_dial(vm, fresh=fresh))
    ending = asyncio.create_task(vm.wait())
    try:
        await asyncio.wait({dialling, ending}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if dialling.done():
            return dialling.result()
        if ending.done():
            raise vmm_ended(ending.result())
        raise DeadlineExceeded(
            f"the guest did not answer within {timeout_s:g} s; look at its console, or raise sandbox.boot_timeout_s",
            reason="GUEST_BOOT_TIMEOUT",
        )
    finally:
        for task in (dialling, ending):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, AgentError):
                    await task


def vmm_ended(exit_info: ExitInfo) -> VmmError:
    """Returns the error for a VM that ended by itself."""
    said = f": {exit_info.stderr_tail}" if exit_info.stderr_tail else ""
    return VmmError(f"the virtual machine is gone ({exit_info.describe()}){said}", reason="VMM_ENDED")


async def _dial(vm: Vm, *, fresh: bool) -> Channel:
    while True:
        try:
            return await Channel.open(await vm.dial(), fresh=fresh)
        except (GuestUnreachable, VmmError):
            await asyncio.sleep(_REDIAL_S)


async def _configure(channel: Channel, record: Record) -> None:
    result = await channel.call(
        "sys.configure",
        entropy=base64.b64encode(os.urandom(64)).decode(),
        time_ns=time.time_ns(),
        hostname=record.id,
        machine_id=os.urandom(16).hex(),
        env=record.spec.env,
        data_disk_serial="data",
        data_disk_bytes=record.spec.disk_bytes,
        net={
            "address": GUEST_IPV4, "gateway": GATEWAY_IPV4.partition("/")[0],
            "address6": GUEST_IPV6, "gateway6": GATEWAY_IPV6.partition("/")[0],
        },
        dns=[GATEWAY_IPV4.partition("/")[0]],
    )  # fmt: skip
    if "phases" not in result:
        raise InvalidState("the guest did not say how it was configured", reason="GUEST_CONFIGURE_FAILED")


def console_note(vm: Vm) -> str:
    """Returns the last console lines for an error message; control characters are left out."""
    text = vm.console_tail(_CONSOLE_TAIL_BYTES).decode(errors="replace")
    clean = "".join(letter for letter in text if letter.isprintable() or letter == "\n").strip()
    return f"\nlast lines of the console:\n{clean}" if clean else ""
