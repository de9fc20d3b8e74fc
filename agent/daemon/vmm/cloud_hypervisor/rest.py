"""Client of Cloud Hypervisor's REST API: the calls that the driver needs (vmm/src/api in its source, at v53.0)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.common.errors import VmmError
from agent.daemon.vmm.cloud_hypervisor import http

_TIMEOUT_S = 10.0
_STATE_TIMEOUT_S = 30.0  # create, boot, snapshot and restore without RAM
_RAM_TIMEOUT_S = 600.0  # a slow disk may have to transfer tens of GiB


class RestClient:
    """The API of one VMM. Sends one request at a time, since its server handles one at a time."""

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
        """Send a request and return its JSON response; None for an empty response.

        :param name: of the endpoint, such as "vm.boot".
        :param fds: descriptors to pass along.
        :raises VmmError: the VMM refused (VMM_API_REFUSED; the message has its explanation), did not respond in time
            (VMM_API_TIMEOUT), or is gone (VMM_API_FAILED).
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
        """Return the VMM's version, such as "53.0.0", as soon as the VMM serves its API."""
        return str((await self._object("vmm.ping")).get("version", ""))

    async def create(self, config: Mapping[str, object]) -> None:
        """Create the VM from a VmConfig. Descriptors in it are ignored: see `add_net`."""
        await self.call("PUT", "vm.create", config, timeout_s=_STATE_TIMEOUT_S)

    async def add_net(self, net: Mapping[str, object], tap_fd: int) -> None:
        """Add a network card on an open TAP; before `boot` it becomes part of the configuration."""
        await self.call("PUT", "vm.add-net", net, [tap_fd])

    async def boot(self) -> None:
        """Boot the VM that `create` made."""
        await self.call("PUT", "vm.boot", timeout_s=_STATE_TIMEOUT_S)

    async def restore(
        self, directory: Path, taps: Mapping[str, int], *, resume: bool = True, ram: bool = False
    ) -> None:
        """Restore a VM from config.json and state.json in `directory`.

        :param taps: an open TAP for each network card of the configuration, by the card's id.
        :param resume: start the CPUs.
        :param ram: the directory has memory-ranges, too, which takes longer to read.
        """
        body: dict[str, object] = {
            "source_url": f"file://{directory}",
            "prefault": False,
            "memory_restore_mode": "Copy",  # applies to memory-ranges; a template has none
            "resume": resume,
        }
        if taps:
            body["net_fds"] = [{"id": name, "num_fds": 1} for name in taps]
        timeout_s = _RAM_TIMEOUT_S if ram else _STATE_TIMEOUT_S
        await self.call("PUT", "vm.restore", body, list(taps.values()), timeout_s=timeout_s)

    async def snapshot(self, directory: Path, *, ram: bool = False) -> None:
        """Write a paused VM's configuration and state into an empty directory.

        :param ram: the RAM is no shared file, so the VMM writes it as well, which takes longer.
        """
        timeout_s = _RAM_TIMEOUT_S if ram else _STATE_TIMEOUT_S
        await self.call("PUT", "vm.snapshot", {"destination_url": f"file://{directory}"}, timeout_s=timeout_s)

    async def state(self) -> str:
        """Return Created, Running, Paused, Shutdown or BreakPoint."""
        return str((await self._object("vm.info")).get("state", ""))

    async def pause(self) -> None:
        """Stop a running VM's CPUs."""
        await self.call("PUT", "vm.pause")

    async def resume(self) -> None:
        """Start a paused VM's CPUs."""
        await self.call("PUT", "vm.resume")

    async def power_button(self) -> None:
        """Press the ACPI power button."""
        await self.call("PUT", "vm.power-button")

    async def resize_disk(self, disk_id: str, size_bytes: int) -> None:
        """Set a disk's size and tell the guest's driver."""
        await self.call("PUT", "vm.resize-disk", {"id": disk_id, "desired_size": size_bytes})

    async def resize(self, vcpus: int | None, balloon_bytes: int | None) -> None:
        """Set the number of CPUs and the size of the balloon, which takes memory from the guest; None keeps a value."""
        wanted = {"desired_vcpus": vcpus, "desired_balloon": balloon_bytes}
        await self.call("PUT", "vm.resize", {key: value for key, value in wanted.items() if value is not None})

    async def counters(self) -> dict[str, dict[str, int]]:
        """Return the counters of each device that has any, as {device id: {counter: value}}.

        A disk's latencies are meaningless before its first operation: they start at the largest integer.
        """
        found: dict[str, dict[str, int]] = {}
        for device, values in (await self._object("vm.counters")).items():
            if isinstance(values, dict):
                found[device] = {name: value for name, value in values.items() if isinstance(value, int)}
        return found
