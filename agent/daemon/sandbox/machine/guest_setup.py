"""Guest side of a sandbox's setup: dial the guest, prepare it (for a template), configure it, set its clock."""

from __future__ import annotations

import asyncio
import base64
import os
import time

from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential

from agent.common.aio import cancel_and_wait
from agent.common.errors import AgentError, DeadlineExceeded, GuestUnreachable, InvalidState, VmmError
from agent.common.model import GATEWAY_IPV4, GATEWAY_IPV6, GUEST_IPV4, GUEST_IPV6
from agent.common.telemetry import note_spans
from agent.daemon.guestlink.channel import Channel
from agent.daemon.host.process import ExitInfo
from agent.daemon.sandbox.machine.vm_shape import DATA_DISK
from agent.daemon.sandbox.state.record import Record
from agent.daemon.vmm.driver import Vm

_FIRST_REDIAL_S, _LAST_REDIAL_S = 0.002, 0.05
_CONSOLE_TAIL_BYTES = 4000  # a panic gives its reason before its registers and call trace
_PREPARE_TIMEOUT_S = 120.0
_SYNC_TIMEOUT_S = 10.0
_GUEST_PHASES = frozenset({"entropy", "clock", "root", "names", "network", "resolver"})
_MAX_PHASES = 32
# A clock is accurate to within the duration of the call that set it; the last attempt may take any time.
_CLOCK_ATTEMPTS, _CLOCK_ACCURACY_S = 4, 0.03
_NET = {
    "address": GUEST_IPV4, "gateway": GATEWAY_IPV4.partition("/")[0],
    "address6": GUEST_IPV6, "gateway6": GATEWAY_IPV6.partition("/")[0],
}  # fmt: skip
NETWORK = {"net": _NET, "dns": [_NET["gateway"]]}  # network fields of sys.configure, the same for every guest


async def connect(vm: Vm, *, fresh: bool, timeout_s: float) -> Channel:
    """Dial until the guest answers.

    :param fresh: the guest has never had a link; see `Channel.open`.
    :raises VmmError: the VM ended.
    :raises DeadlineExceeded: the guest did not answer within `timeout_s`.
    """
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
        await cancel_and_wait(dialling, ending)


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
    """Have a freshly booted guest do all work that its clones can share, before it is saved as a template.

    :raises AgentError: the guest failed, or did not answer in time.
    """
    await channel.call(
        "sys.prepare", timeout_s=_PREPARE_TIMEOUT_S, data_disk_serial=DATA_DISK, net=_NET, emulated=emulated
    )


async def configure(channel: Channel, record: Record, timeout_s: float) -> None:
    """Give the guest the identity, environment, disk and network of a sandbox; record the guest's phases as spans.

    :raises AgentError: the guest failed, or did not answer in time.
    """
    result = await channel.call(
        "sys.configure",
        timeout_s=timeout_s,
        entropy=_entropy(),
        time_ns=time.time_ns(),
        hostname=record.id,
        machine_id=os.urandom(16).hex(),
        env=record.spec.env,
        data_disk_serial=DATA_DISK,
        data_disk_bytes=record.spec.disk_bytes,
        grow=bool(record.spec.root),
        **NETWORK,
    )
    _record_phases(result.get("phases"))


async def refresh(channel: Channel, timeout_s: float, hostname: str = "") -> None:
    """Give a guest that was paused fresh entropy and the present time.

    :param hostname: new identity for the guest of a fork; "" keeps the present one.
    :raises AgentError: the guest failed, or did not answer in time.
    """
    identity = {"hostname": hostname, "machine_id": os.urandom(16).hex()} if hostname else {}
    await channel.call("sys.refresh", timeout_s=timeout_s, entropy=_entropy(), time_ns=time.time_ns(), **identity)
    await set_clock(channel, timeout_s)


def _entropy() -> str:
    return base64.b64encode(os.urandom(64)).decode()


async def mount(channel: Channel, serial: str, path: str, size_bytes: int, timeout_s: float) -> None:
    """Mount the volume on the disk `serial` at `path` in the guest.

    :raises AgentError: the guest failed, or did not answer in time.
    """
    await channel.call("sys.mount", timeout_s=timeout_s, serial=serial, path=path, bytes=size_bytes)


async def sync(channel: Channel) -> None:
    """Have the guest write its cached data to its disks.

    :raises AgentError: the guest failed, or did not answer in time.
    """
    await channel.call("sys.sync", timeout_s=_SYNC_TIMEOUT_S)


async def set_clock(channel: Channel, timeout_s: float) -> None:
    """Set the guest's wall clock to the host's.

    More accurate than the time in sys.configure, whose code is cold in a fresh clone.

    :raises AgentError: the guest failed, or did not answer in time.
    """
    for _ in range(_CLOCK_ATTEMPTS):
        start = time.monotonic()
        await channel.call("sys.clock", timeout_s=timeout_s, time_ns=time.time_ns())
        if time.monotonic() - start <= _CLOCK_ACCURACY_S:
            return


def _record_phases(phases: object) -> None:
    """Record [name, milliseconds] pairs of a guest as spans; entries that are not such pairs are dropped.

    :raises InvalidState: `phases` is no list.
    """
    if not isinstance(phases, list):
        raise InvalidState("the guest did not report how it was configured", reason="GUEST_CONFIGURE_FAILED")
    known: list[tuple[str, float]] = []
    for entry in phases[:_MAX_PHASES]:
        match entry:
            case [str(name), int() | float() as milliseconds] if name in _GUEST_PHASES and 0 <= milliseconds < 1e6:
                known.append((f"guest.{name}", milliseconds / 1000))
    note_spans(known)


def vmm_ended(exit_info: ExitInfo) -> VmmError:
    """Return the error for a VMM that ended although nothing stopped it."""
    last_output = f": {exit_info.stderr_tail}" if exit_info.stderr_tail else ""
    return VmmError(f"the virtual machine is gone ({exit_info.describe()}){last_output}", reason="VMM_ENDED")


def console_note(vm: Vm) -> str:
    """Return the last console lines for an error message, without control characters; "" for an empty console."""
    text = vm.console_tail(_CONSOLE_TAIL_BYTES).decode(errors="replace")
    clean = "".join(letter for letter in text if letter.isprintable() or letter == "\n").strip()
    return f"\nlast lines of the console:\n{clean}" if clean else ""


def add_console(error: AgentError, vm: Vm) -> None:
    """Append the last console lines of a VM to an error's message."""
    error.message += console_note(vm)
    error.args = (error.message,)
