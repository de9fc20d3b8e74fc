"""What the agent says to a guest until it is a sandbox: dial, prepare (for a template), configure."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import time
from typing import TYPE_CHECKING

from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential

from agent.common.errors import AgentError, DeadlineExceeded, GuestUnreachable, InvalidState, VmmError
from agent.common.model import GATEWAY_IPV4, GATEWAY_IPV6, GUEST_IPV4, GUEST_IPV6
from agent.common.telemetry import note_spans
from agent.daemon.guestlink.channel import Channel
from agent.daemon.host.process import ExitInfo
from agent.daemon.sandbox.machine.vm_shape import DATA_DISK
from agent.daemon.sandbox.state.record import Record
from agent.daemon.vmm.driver import Vm

if TYPE_CHECKING:
    from agent.daemon.sandbox.machine.machine import Machine

_FIRST_REDIAL_S, _LAST_REDIAL_S = 0.002, 0.05
_CONSOLE_TAIL_BYTES = 4000  # a panic says why before its registers and call trace
_PREPARE_TIMEOUT_S = 120.0
_SYNC_TIMEOUT_S = 10.0
_GUEST_PHASES = frozenset({"entropy", "clock", "root", "names", "network", "resolver"})
# A clock is right to within the time that setting it took; the last of the tries may take any time.
_CLOCK_TRIES, _CLOCK_GOOD_S = 4, 0.03
_NET = {
    "address": GUEST_IPV4, "gateway": GATEWAY_IPV4.partition("/")[0],
    "address6": GUEST_IPV6, "gateway6": GATEWAY_IPV6.partition("/")[0],
}  # fmt: skip
NETWORK = {"net": _NET, "dns": [_NET["gateway"]]}  # of a guest's configuration: the same for all


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


async def _dial(vm: Vm, *, fresh: bool) -> Channel:
    """Dial again and again, with pauses of 2 to 50 ms; tenacity adds 0.1 ms to each attempt."""

    async def dial() -> Channel:
        return await Channel.open(await vm.dial(), fresh=fresh)

    return await AsyncRetrying(
        retry=retry_if_exception_type((GuestUnreachable, VmmError)),
        wait=wait_exponential(multiplier=_FIRST_REDIAL_S, max=_LAST_REDIAL_S),
        sleep=asyncio.sleep,
    )(dial)


async def prepare(channel: Channel, *, emulated: bool) -> None:
    """Brings a fresh guest to the point where it is frozen as a template. :raises AgentError:"""
    await channel.call(
        "sys.prepare", timeout_s=_PREPARE_TIMEOUT_S, data_disk_serial=DATA_DISK, net=_NET, emulated=emulated
    )


async def configure(channel: Channel, record: Record, timeout_s: float) -> None:
    """Makes the guest this sandbox, and notes the phases that it says this took. :raises AgentError:"""
    result = await channel.call(
        "sys.configure",
        timeout_s=timeout_s,
        entropy=base64.b64encode(os.urandom(64)).decode(),
        time_ns=time.time_ns(),
        hostname=record.id,
        machine_id=os.urandom(16).hex(),
        env=record.spec.env,
        data_disk_serial=DATA_DISK,
        data_disk_bytes=record.spec.disk_bytes,
        grow=bool(record.spec.root),
        **NETWORK,
    )
    _note_phases(result.get("phases"))


async def refresh(channel: Channel, timeout_s: float, hostname: str = "") -> None:
    """Brings a guest that stood still to now: fresh entropy and the time. :raises AgentError:

    :param hostname: of a copy, which gets an identity of its own; "" leaves it as it is.
    """
    identity = {"hostname": hostname, "machine_id": os.urandom(16).hex()} if hostname else {}
    entropy = base64.b64encode(os.urandom(64)).decode()
    await channel.call("sys.refresh", timeout_s=timeout_s, entropy=entropy, time_ns=time.time_ns(), **identity)
    await set_clock(channel, timeout_s)


async def mount(channel: Channel, serial: str, path: str, size_bytes: int, timeout_s: float) -> None:
    """Mounts a volume in the guest. :raises AgentError:"""
    await channel.call("sys.mount", timeout_s=timeout_s, serial=serial, path=path, bytes=size_bytes)


async def sync(machine: Machine) -> None:
    """Has the guest write to its disks what it holds; best effort: a guest that does not answer keeps its loss.

    Before the end of a sandbox with volumes.
    """
    with contextlib.suppress(AgentError):
        await machine.channel.call("sys.sync", timeout_s=_SYNC_TIMEOUT_S)


async def set_clock(channel: Channel, timeout_s: float) -> None:
    """Sets the guest's wall clock to the host's; better than by sys.configure, whose code is cold in a fresh clone.

    :raises AgentError:
    """
    for _ in range(_CLOCK_TRIES):
        start = time.monotonic()
        await channel.call("sys.clock", timeout_s=timeout_s, time_ns=time.time_ns())
        if time.monotonic() - start <= _CLOCK_GOOD_S:
            return


def _note_phases(phases: object) -> None:
    """Takes what a guest says of its phases, in milliseconds; it may say anything."""
    if not isinstance(phases, list):
        raise InvalidState("the guest did not say how it was configured", reason="GUEST_CONFIGURE_FAILED")
    known: list[tuple[str, float]] = []
    for entry in phases[:32]:
        match entry:
            case [str(name), int() | float() as milliseconds] if name in _GUEST_PHASES and 0 <= milliseconds < 1e6:
                known.append((f"guest.{name}", milliseconds / 1000))
    note_spans(known)


def vmm_ended(exit_info: ExitInfo) -> VmmError:
    """Returns the error for a VM that ended by itself."""
    said = f": {exit_info.stderr_tail}" if exit_info.stderr_tail else ""
    return VmmError(f"the virtual machine is gone ({exit_info.describe()}){said}", reason="VMM_ENDED")


def console_note(vm: Vm) -> str:
    """Returns the last console lines for an error message; control characters are left out."""
    text = vm.console_tail(_CONSOLE_TAIL_BYTES).decode(errors="replace")
    clean = "".join(letter for letter in text if letter.isprintable() or letter == "\n").strip()
    return f"\nlast lines of the console:\n{clean}" if clean else ""
