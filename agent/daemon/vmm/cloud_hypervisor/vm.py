"""One running Cloud Hypervisor process; see `agent.daemon.vmm.driver.Vm`."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from agent.common.errors import VmmError, VmmUnsupported
from agent.daemon.host.process import ExitInfo, HostProcess
from agent.daemon.vmm import confinement as vmm_confinement
from agent.daemon.vmm import sockets
from agent.daemon.vmm.cloud_hypervisor.config import disk_id
from agent.daemon.vmm.cloud_hypervisor.layout import Layout
from agent.daemon.vmm.cloud_hypervisor.pipes import Events, Log
from agent.daemon.vmm.cloud_hypervisor.rest import RestClient

LINK_PORT = 1024
_LAST_WORDS_BYTES = 4096


class CloudHypervisorVm:
    """A VMM process with its sockets, console and events.

    :param is_template: its RAM is a shared file, so that it can be snapshotted.
    :param give_back: called once the VMM is gone: takes back what it was lent.
    :param uid: whom it runs as; None: the agent's own user.
    """

    def __init__(
        self, layout: Layout, process: HostProcess, console: Log, log: Log, events: Events, *, is_template: bool,
        give_back: Callable[[], None] = lambda: None, uid: int | None = None,
    ) -> None:  # fmt: skip
        self.api = RestClient(layout.api)
        self._layout = layout
        self._process = process
        self._console = console
        self._log = log
        self._events = events
        self._is_template = is_template
        self._give_back = give_back
        self._uid = uid
        self._ending: asyncio.Task[None] | None = None
        events.on_event = self._on_event

    def _on_event(self, name: str) -> None:
        # It would boot again, in place: our VMs end instead, as with QEMU's -no-reboot.
        if name == "vm rebooting" and self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._process.kill())

    @property
    def pid(self) -> int:
        """PID of the VMM."""
        return self._process.pid

    @property
    def resume_token(self) -> Mapping[str, str]:
        """What `CloudHypervisorDriver.adopt` needs."""
        return {
            "pid": str(self.pid),
            "start_time": str(self._process.start_time),
            "template": "yes" if self._is_template else "no",
            **({} if self._uid is None else {"uid": str(self._uid)}),
        }

    async def dial(self) -> socket.socket:
        """Connects to the guest's AF_VSOCK port."""
        return await sockets.connect_vsock(self._layout.vsock, LINK_PORT)

    async def wait(self) -> ExitInfo:
        """Returns once the VMM has ended."""
        ended = await self._process.wait()
        return dataclasses.replace(
            ended, stderr_tail=self._log.tail(_LAST_WORDS_BYTES).decode(errors="replace").strip()
        )

    async def stop(self) -> None:
        """Ends the VMM and removes its sockets and pipes; logs stay."""
        await self._process.kill()
        self._give_back()
        self._events.on_event = None
        for pipe in (self._console.pipe, self._log.pipe, self._events.pipe):
            pipe.close()
        self._layout.remove()

    async def snapshot(self, directory: Path) -> None:
        """Pauses the VM and writes its configuration and device state; see `agent.daemon.vmm.driver.Vm`.

        No connection to the guest may be open: the guest would believe in it for ever after.
        """
        if not self._is_template:
            raise VmmUnsupported(
                "only a VM whose RAM is a shared file can be snapshotted", reason="SNAPSHOT_UNSUPPORTED"
            )
        await self.pause()
        try:
            await self.api.snapshot(self._layout.snapshot, ram=False)
        except VmmError as error:
            raise VmmError(f"the snapshot failed: {error.message}", reason="SNAPSHOT_FAILED") from error
        self._layout.take_snapshot(directory)

    async def save(self, directory: Path) -> None:
        """Pauses the VM and writes all of it; see `agent.daemon.vmm.driver.Vm`.

        Connections to the guest must be closed.
        """
        if self._is_template:
            raise VmmUnsupported("a VM whose RAM is a shared file cannot be saved", reason="SNAPSHOT_UNSUPPORTED")
        await self.pause()
        vmm_confinement.lend_path(self._uid, directory)
        try:
            await self.api.snapshot(directory, ram=True)
        except VmmError as error:
            raise VmmError(f"the snapshot failed: {error.message}", reason="SNAPSHOT_FAILED") from error
        await asyncio.to_thread(self._layout.take_save, directory)

    async def announce_disk_size(self, serial: str, size_bytes: int) -> None:
        """Makes the disk's device take the size, which its file has already, and tell its driver."""
        await self.api.resize_disk(disk_id(serial), size_bytes)

    async def pause(self) -> None:
        """Stops the CPUs."""
        if await self.api.state() != "Paused":
            await self.api.pause()

    async def resume(self) -> None:
        """Lets the CPUs go on."""
        if await self.api.state() == "Paused":
            await self.api.resume()

    async def power_button(self) -> None:
        """Presses the ACPI power button; once the guest is off, the VMM ends with status 0."""
        await self.api.power_button()

    async def resize(self, *, vcpus: int | None = None, balloon_bytes: int | None = None) -> None:
        """Sets the number of CPUs (at most what the VM started with) and what the balloon takes. :raises VmmError:"""
        await self.api.resize(vcpus, balloon_bytes)

    async def counters(self) -> dict[str, dict[str, int]]:
        """Returns what each device has counted since the VM started or was restored. :raises VmmError:"""
        return await self.api.counters()

    def console_tail(self, limit_bytes: int) -> bytes:
        """Returns the end of the serial console."""
        return self._console.tail(limit_bytes)

    @property
    def events(self) -> Events:
        """What the VMM has reported."""
        return self._events
