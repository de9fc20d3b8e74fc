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
from agent.daemon.vmm.cloud_hypervisor.pipes import Log, VmmEvents
from agent.daemon.vmm.cloud_hypervisor.rest import RestClient
from guest.wire import LINK_PORT

_LAST_OUTPUT_BYTES = 4096


class CloudHypervisorVm:
    """A VMM process with its sockets, console and events.

    :param is_template: the RAM is a shared file, so the VM can be snapshotted and not saved.
    :param reclaim: called after the VMM has ended; see `agent.daemon.vmm.confinement.reclaim`.
    :param uid: the user that the VMM runs as; None: the agent's own.
    """

    def __init__(
        self, layout: Layout, process: HostProcess, console: Log, log: Log, events: VmmEvents, *, is_template: bool,
        reclaim: Callable[[], None] = lambda: None, uid: int | None = None,
    ) -> None:  # fmt: skip
        self.api = RestClient(layout.api)
        self._layout = layout
        self._process = process
        self._console = console
        self._log = log
        self._events = events
        self._is_template = is_template
        self._reclaim = reclaim
        self._uid = uid
        self._ending: asyncio.Task[None] | None = None
        events.on_event = self._on_event

    def _on_event(self, name: str) -> None:
        # End the VMM instead of a reboot in place, as QEMU does with -no-reboot.
        if name == "vm rebooting" and self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._process.kill())

    @property
    def pid(self) -> int:
        """PID of the VMM."""
        return self._process.pid

    @property
    def resume_token(self) -> Mapping[str, str]:
        """Facts by which `CloudHypervisorDriver.adopt` finds this VM again."""
        return {
            "pid": str(self.pid),
            "start_time": str(self._process.start_time),
            "template": "yes" if self._is_template else "no",
            **({} if self._uid is None else {"uid": str(self._uid)}),
        }

    async def dial(self) -> socket.socket:
        """Connect to the guest's AF_VSOCK port."""
        return await sockets.connect_vsock(self._layout.vsock, LINK_PORT)

    async def wait(self) -> ExitInfo:
        """Wait for the end of the VMM."""
        ended = await self._process.wait()
        return dataclasses.replace(
            ended, stderr_tail=self._log.tail(_LAST_OUTPUT_BYTES).decode(errors="replace").strip()
        )

    async def stop(self) -> None:
        """Kill the VMM and remove its sockets and FIFOs; logs stay."""
        await self._process.kill()
        self._reclaim()
        self._events.on_event = None
        for pipe in (self._console.pipe, self._log.pipe, self._events.pipe):
            pipe.close()
        self._layout.remove()

    async def snapshot(self, directory: Path) -> None:
        """Pause the VM and write its configuration and device state; see `agent.daemon.vmm.driver.Vm`.

        No connection to the guest may be open: the guest of every clone would keep it open for ever.
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
        self._layout.copy_snapshot(directory)

    async def save(self, directory: Path) -> None:
        """Pause the VM and write configuration, device state and RAM; see `agent.daemon.vmm.driver.Vm`.

        No connection to the guest may be open.
        """
        if self._is_template:
            raise VmmUnsupported("a VM whose RAM is a shared file cannot be saved", reason="SNAPSHOT_UNSUPPORTED")
        await self.pause()
        vmm_confinement.grant_path(self._uid, directory)
        try:
            await self.api.snapshot(directory, ram=True)
        except VmmError as error:
            raise VmmError(f"the snapshot failed: {error.message}", reason="SNAPSHOT_FAILED") from error
        await asyncio.to_thread(self._layout.reclaim_saved, directory)

    async def announce_disk_size(self, serial: str, size_bytes: int) -> None:
        """Tell the guest's driver the size that the disk's file has already."""
        await self.api.resize_disk(disk_id(serial), size_bytes)

    async def pause(self) -> None:
        """Stop the CPUs."""
        if await self.api.state() != "Paused":
            await self.api.pause()

    async def resume(self) -> None:
        """Start the CPUs again."""
        if await self.api.state() == "Paused":
            await self.api.resume()

    async def power_button(self) -> None:
        """Press the ACPI power button; when the guest is off, the VMM ends with status 0."""
        await self.api.power_button()

    async def resize(self, *, vcpus: int | None = None, balloon_bytes: int | None = None) -> None:
        """Set the number of CPUs (at most that of the start) and the size of the balloon.

        :raises VmmError: the VMM refused.
        """
        await self.api.resize(vcpus, balloon_bytes)

    async def counters(self) -> dict[str, dict[str, int]]:
        """Return each device's counters since the VM started or was restored; see `RestClient.counters`.

        :raises VmmError: the VMM did not respond.
        """
        return await self.api.counters()

    def console_tail(self, limit_bytes: int) -> bytes:
        """Return the last output on the serial console."""
        return self._console.tail(limit_bytes)

    @property
    def events(self) -> VmmEvents:
        """Events that the VMM reports."""
        return self._events
