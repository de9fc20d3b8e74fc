"""What a sandbox has on the host besides its VM: directories, disk, network namespace. Made in order, removed by
name.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from agent.common.config.paths import Paths
from agent.common.config.settings import Settings
from agent.common.errors import HostError
from agent.daemon.host.cgroup import Cgroups, GroupLimits, block_device
from agent.daemon.host.uid_pool import Uids
from agent.daemon.sandbox.machine.vm_shape import SLOT_BYTES
from agent.daemon.sandbox.state.record import Record
from agent.daemon.storage.disks import DiskMaker
from agent.daemon.storage.volumes import Volumes
from agent.daemon.vmm.driver import Driver


class Network(Protocol):
    """What the lifecycle of sandboxes needs of `agent.daemon.network.sandbox_network`."""

    async def make(self, record: Record, stack: AsyncExitStack) -> None:
        """Makes a sandbox's network; `stack` removes it. :raises AgentError:"""

    async def make_bare(self, sandbox_id: str, stack: AsyncExitStack) -> None:
        """Makes a namespace with a tap that leads nowhere; `stack` removes it. :raises HostError:"""

    async def adopt(self, record: Record, vmm_pid: int) -> None:
        """Takes over what an earlier agent made; the VMM is in it. :raises AgentError:"""

    async def update(self, record: Record) -> None:
        """Puts the record's network policy and secrets into force. :raises AgentError:"""

    async def remove(self, sandbox_id: str) -> None:
        """Removes all of a sandbox's network. Idempotent. :raises HostError:"""

    async def count_drops(self, record: Record) -> None:
        """Adds what the kernel dropped since the last look to the record's denials. :raises HostError:"""

    async def hold(self, record: Record, values: Mapping[str, str]) -> dict[str, str]:
        """Keeps these values of the record's secrets, forgets those of no secret, and makes a CA where one is needed.

        Returns the values that there were before. :raises HostError:
        """

    async def inherit(self, sandbox_id: str, parent: str) -> None:
        """Keeps for a fork what `hold` keeps for its parent. :raises HostError:"""

    def fingerprint(self, values: Mapping[str, str]) -> str:
        """Returns what tells these values of secrets from others, and nothing about them without the node's key."""

    async def release(self, sandbox_id: str) -> None:
        """Forgets what `hold` kept. Idempotent. :raises HostError:"""

    async def ca_certificate(self, record: Record) -> str:
        """Returns the certificate of the sandbox's CA, in PEM; "" if it has none. :raises HostError:"""

    async def trust(self, record: Record) -> dict[str, object] | None:
        """Returns the fields of sys.trust for this sandbox's guest; None if it needs to trust nobody new.

        :raises HostError:
        """


@dataclass(frozen=True, slots=True)
class Host:
    """What machines are made with."""

    settings: Settings
    paths: Paths
    driver: Driver
    disks: DiskMaker
    network: Network
    volumes: Volumes
    uids: Uids
    cgroups: Cgroups


_TASKS, _TASKS_OF_CPU = 256, 4  # threads of a VMM: one for each CPU, and up to 64 for each disk's requests
# Of an emulator, most is the code that it has translated (1 GiB at most) and the maps of it.
_HEADROOM_BYTES = {"kvm": 512 << 20, "tcg": 1536 << 20}


async def make_cgroup(host: Host, sandbox_id: str, vcpus: int, ram_bytes: int, stack: AsyncExitStack) -> Path | None:
    """Makes the control group of a sandbox's VMM, if there can be one; `stack` removes it. :raises HostError:"""
    settings, sandbox = host.settings.cgroups, host.settings.sandbox
    headroom = settings.memory_headroom_bytes or _HEADROOM_BYTES[(await host.driver.probe()).accelerator]
    limits = GroupLimits(
        cpus=vcpus + settings.cpu_headroom, weight=100 * vcpus, memory_bytes=ram_bytes + headroom,
        tasks=_TASKS + _TASKS_OF_CPU * vcpus, device=block_device(host.paths.state_dir),
        io_bytes=sandbox.disk_bytes_per_s, io_operations=sandbox.disk_operations_per_s,
    )  # fmt: skip
    group = host.cgroups.make(sandbox_id, limits)
    stack.push_async_callback(asyncio.to_thread, host.cgroups.remove, sandbox_id)
    return group


def make_run_directory(host: Host, sandbox_id: str, stack: AsyncExitStack) -> None:
    """Makes the directory for sockets and logs; `stack` removes it. :raises HostError:"""
    _make_directory(host.paths.sandbox_run(sandbox_id), stack)


def make_state_directory(host: Host, sandbox_id: str, uid: int | None, stack: AsyncExitStack) -> None:
    """Makes the directory for the disk; `stack` removes it. :raises HostError:"""
    state = host.paths.sandbox_state(sandbox_id)
    _make_directory(state, stack)
    open_to(state, uid)


def open_to(directory: Path, uid: int | None) -> None:
    """Opens the way through a directory to a VMM that is another user. :raises HostError:"""
    if uid is None:
        return
    try:
        os.chown(directory, -1, uid)
        directory.chmod(0o710)
    except OSError as error:
        raise HostError(
            f"cannot open {directory} to user {uid}: {error.strerror}", reason="STATE_UNAVAILABLE"
        ) from error


def _make_directory(path: Path, stack: AsyncExitStack) -> None:
    try:
        path.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise HostError(f"cannot make {path}: {error.strerror}", reason="STATE_UNAVAILABLE") from error
    stack.push_async_callback(asyncio.to_thread, remove_tree, path)


def make_slots(host: Host, sandbox_id: str, count: int) -> None:
    """Makes what a VM has in places for volumes that stay empty. :raises HostError:"""
    for number in range(count):
        path = host.paths.empty_slot(sandbox_id, number)
        try:
            with path.open("xb") as file:
                file.truncate(SLOT_BYTES)
        except FileExistsError:
            continue  # made for a clone that failed
        except OSError as error:
            raise HostError(f"cannot make {path}: {error.strerror}", reason="STATE_UNAVAILABLE") from error


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
    async with AsyncExitStack() as stack:
        push_state_removal(host, sandbox_id, stack)
        return await remove_volatile(host, sandbox_id)
    raise AssertionError("unreachable: nothing above suppresses exceptions")


async def remove_volatile(host: Host, sandbox_id: str) -> int:
    """Removes all but what is on its disk; returns how many processes it ended."""
    strays = await asyncio.to_thread(kill_strays, host, sandbox_id)
    async with AsyncExitStack() as stack:
        push_volatile_removal(host, sandbox_id, stack)
    return strays


def push_volatile_removal(host: Host, sandbox_id: str, stack: AsyncExitStack) -> None:
    """Makes `stack` remove all that a sandbox has besides VM and disk; absence is success."""
    stack.push_async_callback(asyncio.to_thread, remove_tree, host.paths.sandbox_run(sandbox_id))
    # Before the directories: what has none is not looked for.
    stack.push_async_callback(asyncio.to_thread, host.cgroups.remove, sandbox_id)
    stack.push_async_callback(host.network.remove, sandbox_id)


def push_state_removal(host: Host, sandbox_id: str, stack: AsyncExitStack) -> None:
    """Makes `stack` remove what a sandbox has on the disk; absence is success."""
    stack.push_async_callback(asyncio.to_thread, remove_tree, host.paths.sandbox_state(sandbox_id))


def remove_tree(path: Path) -> None:
    """Removes a directory with all it holds; absence is success. :raises HostError:"""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"cannot remove {path}: {error.strerror}; remove it by hand", reason="REMOVE_FAILED") from error
