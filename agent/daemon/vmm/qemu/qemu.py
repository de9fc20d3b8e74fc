"""QEMU driver: starts and adopts QEMU processes; see `agent.daemon.vmm.driver.Driver`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

from agent.common.errors import GuestUnreachable, VmmError
from agent.daemon.host import process as host_process
from agent.daemon.host.process import HostProcess
from agent.daemon.host.tap import open_tap
from agent.daemon.vmm import confinement as vmm_confinement
from agent.daemon.vmm import sockets
from agent.daemon.vmm.accelerator import AcceleratorProbe
from agent.daemon.vmm.console import Console
from agent.daemon.vmm.driver import LinkKind, VmmInfo, VmmOptions, VmSpec
from agent.daemon.vmm.host_features import cpu_key
from agent.daemon.vmm.qemu import migration, qemu_args, vsock_backend
from agent.daemon.vmm.qemu.qemu_binary import find_qemu
from agent.daemon.vmm.qemu.qemu_vm import BACKEND_SOCKETS, SOCKETS, QemuVm, remove_sockets
from agent.daemon.vmm.qemu.qmp import Qmp

_CONSOLE_LIMIT_OF_ADOPTED_BYTES = 1 << 20
_EXIT_TIMEOUT_S = 0.5  # a QEMU that refused its arguments is about to end


class QemuDriver:
    """Starts VMs with the QEMU of this host.

    :param tools_dir: directory in which the vsock backend may lie.
    """

    def __init__(self, options: VmmOptions, tools_dir: Path, probe: AcceleratorProbe) -> None:
        self._options = options
        self._tools_dir = tools_dir
        self._probe = probe
        self._info: VmmInfo | None = None
        self._binary = ""

    async def probe(self) -> VmmInfo:
        """Find QEMU, check its version, and choose the accelerator."""
        if self._info is None:
            self._binary, version = await find_qemu(self._options.binary)
            accelerator, reason = await self._probe.choose(self._options.accelerator, self._binary, version)
            key = f"qemu {version} {accelerator} {cpu_key() if accelerator == 'kvm' else 'emulated'}"
            key += f" m{qemu_args.REVISION}"
            link = LinkKind.VSOCK if self._options.link == LinkKind.VSOCK else LinkKind.SERIAL
            reason = "; ".join(filter(None, (reason, self._options.note)))
            can_snapshot = link is LinkKind.SERIAL  # QEMU cannot migrate a vsock device
            self._info = VmmInfo("qemu", version, accelerator, reason, key, link, can_snapshot)
        return self._info

    async def start(self, spec: VmSpec) -> QemuVm:
        """Start QEMU paused, connect its console, restore its state if any, and let it run."""
        info = await self.probe()
        backend = await self._start_backend(spec)
        try:
            return await self._start_qemu(spec, info.accelerator, backend)
        except BaseException:
            if backend is not None:
                await _kill(backend)
            remove_sockets(spec.run_dir, BACKEND_SOCKETS)
            raise

    async def _start_backend(self, spec: VmSpec) -> HostProcess | None:
        if spec.link is LinkKind.SERIAL or os.path.exists("/dev/vhost-vsock"):  # noqa: ASYNC240, PTH110  devtmpfs
            return None
        binary = vsock_backend.find_binary(self._tools_dir)
        return await vsock_backend.start(binary, spec.run_dir, qemu_args.GUEST_CID, spec.cgroup)

    async def _start_qemu(self, spec: VmSpec, accelerator: str, backend: HostProcess | None) -> QemuVm:
        reclaim = functools.partial(vmm_confinement.reclaim, spec)
        async with AsyncExitStack() as undo:
            undo.callback(reclaim)
            undo.callback(remove_sockets, spec.run_dir, SOCKETS)
            process = await self._spawn(spec, accelerator, backend)
            undo.push_async_callback(_kill, process)
            console = Console(spec.run_dir, spec.console_limit_bytes)
            undo.push_async_callback(_kill_and_close, process, console)
            await _run(process, console, spec)
            await process.joined_cgroup()
            undo.pop_all()
        return QemuVm(spec.run_dir, spec.link, process, backend, console, spec.uid, reclaim)

    async def _spawn(self, spec: VmSpec, accelerator: str, backend: HostProcess | None) -> HostProcess:
        """Spawn QEMU with its listening sockets and an open TAP.

        The agent's copies of these descriptors are closed: QEMU alone listens, so its end closes the connections.
        """
        names = [name for name in SOCKETS if name != "link" or spec.link is LinkKind.SERIAL]
        with contextlib.ExitStack() as opened:
            listeners = {name: opened.enter_context(sockets.listen(spec.run_dir / f"{name}.sock")) for name in names}
            fds = [listener.fileno() for listener in listeners.values()]
            tap_fd: int | None = None
            if spec.nic is not None:
                tap_fd = await open_tap(spec.nic.tap, spec.netns)
                opened.callback(os.close, tap_fd)
                fds.append(tap_fd)
            vmm_confinement.grant(spec)
            backend_sockets = [] if backend is None else [spec.run_dir / "vhost.sock"]
            for path in backend_sockets:
                vmm_confinement.grant_path(spec.uid, path)
            argv = self._argv(spec, accelerator, backend, listeners, tap_fd)
            return await host_process.spawn(
                vmm_confinement.confinement_of(spec).argv(argv),
                netns=spec.netns,
                stderr_path=spec.run_dir / "vmm.log",
                pass_fds=fds,
                root_view=vmm_confinement.root_view_of(
                    spec, self._binary, _devices(spec, accelerator, backend), writable=backend_sockets
                ),
                cgroup=spec.cgroup,
            )

    def _argv(
        self, spec: VmSpec, accelerator: str, backend: HostProcess | None, listeners: Mapping[str, socket.socket],
        tap_fd: int | None,
    ) -> list[str]:  # fmt: skip
        link = listeners.get("link")
        vsock = None
        if spec.link is LinkKind.VSOCK:
            vsock = qemu_args.vsock_device(None if backend is None else str(spec.run_dir / "vhost.sock"))
        link_fd = None if link is None else link.fileno()
        console_fd, qmp_fd = listeners["console"].fileno(), listeners["qmp"].fileno()
        return [
            self._binary,
            *qemu_args.machine_args(spec, accelerator),
            *qemu_args.device_args(spec, link_fd, console_fd, qmp_fd, vsock, tap_fd),
            *self._options.extra_args,
        ]

    async def adopt(self, id: str, run_dir: Path, token: Mapping[str, str]) -> QemuVm | None:  # noqa: ARG002
        """Return the VM that an earlier agent started; None if it has ended."""
        try:
            process = _adopt_process(token, "", run_dir / "vmm.log")
            backend = _adopt_process(token, "backend_", run_dir / "vsock.log") if "backend_pid" in token else None
            link = LinkKind(token.get("link", "serial"))
        except ValueError:
            return None
        if process is None:
            if backend is not None:
                await backend.kill()
            return None
        try:
            console = Console(run_dir, _CONSOLE_LIMIT_OF_ADOPTED_BYTES)
        except OSError:  # the run directory is gone, and with it all sockets
            for left in filter(None, (process, backend)):
                await left.kill()
            return None
        with contextlib.suppress(GuestUnreachable):
            console.attach(await sockets.connect(run_dir / "console.sock"))
        return QemuVm(run_dir, link, process, backend, console, int(token["uid"]) if "uid" in token else None)


def _devices(spec: VmSpec, accelerator: str, backend: HostProcess | None) -> list[str]:
    """Return the device nodes that a confined QEMU needs."""
    devices = ["/dev/null", "/dev/urandom"]
    if accelerator == "kvm":
        devices.append("/dev/kvm")
    if spec.link is LinkKind.VSOCK and backend is None:
        devices.append("/dev/vhost-vsock")
    return devices


async def _kill(process: HostProcess) -> None:
    await asyncio.shield(asyncio.ensure_future(process.kill()))


async def _kill_and_close(process: HostProcess, console: Console) -> None:
    """Kill QEMU first: the console is read to its end, which comes with QEMU's."""
    await _kill(process)
    await console.aclose()


def _adopt_process(token: Mapping[str, str], prefix: str, stderr_path: Path) -> HostProcess | None:
    pid, started = int(token.get(f"{prefix}pid", "0")), int(token.get(f"{prefix}start_time", "0"))
    return host_process.adopt(pid, started, stderr_path)


async def _run(process: HostProcess, console: Console, spec: VmSpec) -> None:
    """Connect the console, restore the state if any, and start the CPUs unless `start_paused`.

    :raises VmmError: QEMU did not answer, or has ended; the message has its last output then.
    """
    try:
        console.attach(await sockets.connect(spec.run_dir / "console.sock"))
        qmp = await Qmp.connect(str(spec.run_dir / "qmp.sock"))
        try:
            if spec.restore_from is not None:
                await migration.load(qmp, spec.restore_from, ram=spec.memory_file is None)
            if spec.start_paused:
                return
            await qmp.execute("cont")
            if spec.restore_from is not None:  # not before `cont`: until then QEMU does not own the disks
                await _announce_sizes(qmp, spec)
        finally:
            qmp.close()
    except (VmmError, GuestUnreachable) as error:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EXIT_TIMEOUT_S):
                exit_info = await process.wait()
                raise VmmError(
                    f"QEMU {exit_info.describe()} at once: {exit_info.stderr_tail or 'it gave no reason'}",
                    reason="VMM_NOT_STARTED",
                ) from error
        raise VmmError(f"QEMU does not answer: {error.message}", reason="VMM_NOT_STARTED") from error


async def _announce_sizes(qmp: Qmp, spec: VmSpec) -> None:
    """Tell the guest's driver the size of each writable disk: a resize to the present size does so."""
    for disk in spec.disks:
        if not disk.read_only:
            size = await asyncio.to_thread(os.path.getsize, disk.path)
            await qmp.execute("block_resize", node_name=f"d-{disk.serial}", size=size)
