"""One running QEMU process; see `agent.daemon.vmm.driver.Vm`."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from agent.common.errors import GuestUnreachable, VmmError, VmmUnsupported
from agent.daemon.host.process import ExitInfo, HostProcess
from agent.daemon.vmm import confinement as vmm_confinement
from agent.daemon.vmm import sockets
from agent.daemon.vmm.console import Console
from agent.daemon.vmm.driver import LinkKind
from agent.daemon.vmm.qemu import migration, qemu_args
from agent.daemon.vmm.qemu.qmp import Qmp
from guest.wire import LINK_PORT

SOCKETS = ("link", "console", "qmp")
BACKEND_SOCKETS = ("vhost", "vsock")
_DRIVER_OK = "VIRTIO_CONFIG_S_DRIVER_OK"


class QemuVm:
    """A QEMU process with its sockets, console and vsock backend.

    :param backend: vhost-device-vsock; None without a vsock link, and where the kernel has vhost-vsock.
    :param uid: the user that QEMU runs as; None: the agent's own.
    :param reclaim: called after QEMU has ended; see `agent.daemon.vmm.confinement.reclaim`.
    """

    def __init__(
        self, run_dir: Path, link: LinkKind, process: HostProcess, backend: HostProcess | None, console: Console,
        uid: int | None, reclaim: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._run_dir = run_dir
        self._link = link
        self._process = process
        self._backend = backend
        self._console = console
        self._uid = uid
        self._reclaim = reclaim
        self._driver_ready = False

    @property
    def pid(self) -> int:
        """PID of QEMU."""
        return self._process.pid

    @property
    def resume_token(self) -> Mapping[str, str]:
        """Facts by which `QemuDriver.adopt` finds this VM again."""
        token = {"pid": str(self.pid), "start_time": str(self._process.start_time), "link": self._link.value}
        if self._uid is not None:
            token["uid"] = str(self._uid)
        if self._backend is not None:
            token |= {"backend_pid": str(self._backend.pid), "backend_start_time": str(self._backend.start_time)}
        return token

    async def dial(self) -> socket.socket:
        """Connect to the guest's end of the link; over vsock only once the guest's driver is up."""
        if self._link is LinkKind.SERIAL:
            return await sockets.connect(self._run_dir / "link.sock")
        if not self._driver_ready:
            await self._require_vsock_driver()
        if self._backend is None:
            return await _connect_kernel_vsock()
        return await sockets.connect_vsock(self._run_dir / "vsock.sock", LINK_PORT)

    async def _require_vsock_driver(self) -> None:
        try:
            async with self._control() as qmp:
                path = "/machine/peripheral/vsock0/virtio-backend"
                status = await qmp.execute("x-query-virtio-status", path=path)
        except VmmError as error:
            raise GuestUnreachable(f"cannot query the guest's vsock device: {error}") from error
        if not any(str(text).startswith(_DRIVER_OK) for text in status["status"]["statuses"]):
            raise GuestUnreachable("the guest's vsock driver is not up yet", reason="GUEST_BOOTING")
        self._driver_ready = True

    async def wait(self) -> ExitInfo:
        """Wait for the end of QEMU."""
        return await self._process.wait()

    async def stop(self) -> None:
        """Kill QEMU and its backend, and remove their sockets."""
        await self._process.kill()
        if self._backend is not None:
            await self._backend.kill()
        self._reclaim()
        await self._console.aclose()
        remove_sockets(self._run_dir, (*SOCKETS, *BACKEND_SOCKETS))

    @asynccontextmanager
    async def _control(self) -> AsyncIterator[Qmp]:
        qmp = await Qmp.connect(str(self._run_dir / "qmp.sock"))
        try:
            yield qmp
        finally:
            qmp.close()

    async def snapshot(self, directory: Path) -> None:
        """Stop the VM and write its device state; see `agent.daemon.vmm.driver.Vm`."""
        await self._save(directory, ram=False)

    async def save(self, directory: Path) -> None:
        """Stop the VM and write its device state and RAM; see `agent.daemon.vmm.driver.Vm`."""
        await self._save(directory, ram=True)

    async def _save(self, directory: Path, *, ram: bool) -> None:
        if self._link is LinkKind.VSOCK:
            raise VmmUnsupported("a QEMU with a vsock device cannot be snapshotted", reason="SNAPSHOT_UNSUPPORTED")
        vmm_confinement.grant_path(self._uid, directory)
        async with self._control() as qmp:
            await qmp.execute("stop")
            await migration.save(qmp, directory, ram=ram)
        if self._uid is not None:
            await asyncio.to_thread(vmm_confinement.reclaim_directory, directory, migration.FILES)

    async def pause(self) -> None:
        """Stop the CPUs."""
        async with self._control() as qmp:
            await qmp.execute("stop")

    async def resume(self) -> None:
        """Start the CPUs again, after cancelling a save that an earlier agent left unfinished."""
        async with self._control() as qmp:
            if not (await qmp.execute("query-status"))["running"]:
                await migration.cancel(qmp)
                await qmp.execute("cont")

    async def power_button(self) -> None:
        """Press the ACPI power button."""
        async with self._control() as qmp:
            await qmp.execute("system_powerdown")

    def console_tail(self, limit_bytes: int) -> bytes:
        """Return the last output on the serial console."""
        return self._console.tail(limit_bytes)


def remove_sockets(run_dir: Path, names: Iterable[str]) -> None:
    """Remove the named sockets below `run_dir`; missing ones are no error."""
    for name in names:
        (run_dir / f"{name}.sock").unlink(missing_ok=True)


async def _connect_kernel_vsock() -> socket.socket:
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, (qemu_args.GUEST_CID, LINK_PORT))
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            raise GuestUnreachable(f"the guest's vsock port does not answer: {error}") from error
        raise
    return sock
