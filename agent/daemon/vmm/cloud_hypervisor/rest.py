"""Cloud Hypervisor's REST API, the calls that the driver makes (vmm/src/api in its source, at v53.0)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.common.errors import VmmError
from agent.daemon.vmm.cloud_hypervisor import http

_TIMEOUT_S = 10.0
_STATE_TIMEOUT_S = 30.0  # creating, booting, writing and reading a snapshot
_RAM_TIMEOUT_S = 600.0  # for what a slow disk takes with tens of GiB


class RestClient:
    """The API of one VMM. One request at a time, as its server handles them."""

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path
        self._lock = asyncio.Lock()

    async def call(
        self,
        method: str,
        name: str,
        body: Mapping[str, object] | None = None,
        fds: Sequence[int] = (),
        *,
        timeout_s: float = _TIMEOUT_S,
    ) -> Any:
        """Returns the JSON that a call answers with, None where it answers with nothing.

        :raises VmmError: refused, not answered in time, or the VMM is gone; the message has its whole explanation.
        """
        data = b"" if body is None else json.dumps(body).encode()
        async with self._lock:
            answer = await http.request(self._path, method, name, data, fds, timeout_s=timeout_s)
        if not 200 <= answer.status < 300:
            raise http.refusal(name, answer)
        if not answer.body:
            return None
        try:
            return json.loads(answer.body)
        except (ValueError, RecursionError) as error:
            raise VmmError(
                f"Cloud Hypervisor answered {name} with garbage: {error}", reason="VMM_API_FAILED"
            ) from error

    async def _object(self, name: str) -> dict[str, Any]:
        value = await self.call("GET", name)
        if not isinstance(value, dict):
            raise VmmError(f"Cloud Hypervisor answered {name} with garbage", reason="VMM_API_FAILED")
        return value

    async def ping(self) -> str:
        """Returns the VMM's version, such as "53.0.0"; returns as soon as it serves its API."""
        return str((await self._object("vmm.ping")).get("version", ""))

    async def create(self, config: Mapping[str, object]) -> None:
        """Gives the VMM a VmConfig. Descriptors in it are ignored: see `add_net`."""
        await self.call("PUT", "vm.create", config, timeout_s=_STATE_TIMEOUT_S)

    async def add_net(self, net: Mapping[str, object], tap_fd: int) -> None:
        """Adds a card on an open tap; before `boot` it becomes part of the configuration."""
        await self.call("PUT", "vm.add-net", net, [tap_fd])

    async def boot(self) -> None:
        """Boots what `create` gave."""
        await self.call("PUT", "vm.boot", timeout_s=_STATE_TIMEOUT_S)

    async def restore(
        self, directory: Path, taps: Mapping[str, int], *, resume: bool = True, ram: bool = False
    ) -> None:
        """Restores from config.json and state.json in `directory`, and perhaps lets the CPUs go on.

        :param taps: an open tap for each card of the configuration, by the card's id.
        :param ram: from memory-ranges in it, too.
        """
        body: dict[str, object] = {
            "source_url": f"file://{directory}",
            "prefault": False,
            "memory_restore_mode": "Copy",  # of the saved ranges, and a template has none
            "resume": resume,
        }
        if taps:
            body["net_fds"] = [{"id": name, "num_fds": 1} for name in taps]
        timeout_s = _RAM_TIMEOUT_S if ram else _STATE_TIMEOUT_S
        await self.call("PUT", "vm.restore", body, list(taps.values()), timeout_s=timeout_s)

    async def snapshot(self, directory: Path, *, ram: bool = False) -> None:
        """Writes a paused VM's configuration and state into an empty directory.

        :param ram: its RAM will be written as well, since that is no shared file.
        """
        timeout_s = _RAM_TIMEOUT_S if ram else _STATE_TIMEOUT_S
        await self.call("PUT", "vm.snapshot", {"destination_url": f"file://{directory}"}, timeout_s=timeout_s)

    async def state(self) -> str:
        """Returns Created, Running, Paused, Shutdown or BreakPoint."""
        return str((await self._object("vm.info")).get("state", ""))

    async def pause(self) -> None:
        """Stops a running VM's CPUs."""
        await self.call("PUT", "vm.pause")

    async def resume(self) -> None:
        """Lets a paused VM's CPUs go on."""
        await self.call("PUT", "vm.resume")

    async def power_button(self) -> None:
        """Presses the ACPI power button."""
        await self.call("PUT", "vm.power-button")

    async def resize_disk(self, disk_id: str, size_bytes: int) -> None:
        """Sets a disk's size and tells the guest's driver."""
        await self.call("PUT", "vm.resize-disk", {"id": disk_id, "desired_size": size_bytes})

    async def resize(self, vcpus: int | None, balloon_bytes: int | None) -> None:
        """Sets the number of CPUs, and what the balloon takes from the guest; None leaves it."""
        wanted = {"desired_vcpus": vcpus, "desired_balloon": balloon_bytes}
        await self.call("PUT", "vm.resize", {key: value for key, value in wanted.items() if value is not None})

    async def counters(self) -> dict[str, dict[str, int]]:
        """Returns the counters of each device that has any, by the device's id.

        A disk's latencies mean nothing before its first operation: they start at the largest number there is.
        """
        found: dict[str, dict[str, int]] = {}
        for device, values in (await self._object("vm.counters")).items():
            if isinstance(values, dict):
                found[device] = {name: value for name, value in values.items() if isinstance(value, int)}
        return found
