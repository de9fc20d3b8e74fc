"""The QEMU driver: starts, finds again and ends QEMU proc."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from agent.common.errors import GuestUnreachable, VmmError, VmmUnsupported
from agent.daemon.host import process as host_process
from agent.daemon.host.capture import stdout_of
from agent.daemon.host.process import ExitInfo, HostProcess
from agent.daemon.host.tap import open_tap
from agent.daemon.vmm import confinement as vmm_confinement
from agent.daemon.vmm import sockets
from agent.daemon.vmm.accelerator import AcceleratorProbe
from agent.daemon.vmm.console import Console
from agent.daemon.vmm.cpu import cpu_key
from agent.daemon.vmm.driver import LinkKind, VmmInfo, VmmOptions, VmSpec
from agent.daemon.vmm.qemu import migration, qemu_args, vsock_backend
from agent.daemon.vmm.qemu.qmp import Qmp

LINK_PORT = 1024
_MIN_VERSION = (8, 2)  # migration to a file, which templates need
_BINARY = "qemu-system-x86_64"
_VERSION_TIMEOUT_S = 10.0
_SOCKETS = ("link", "console", "qmp")
_DRIVER_OK = "VIRTIO_CONFIG_S_DRIVER_OK"
_CONSOLE_FOR_ADOPTED_BYTES = 1 << 20


class QemuVm:
    """One QEMU process and its sockets; see `agent.daemon.vmm.driver.Vm`."""

    def __init__(
        self, run_dir: Path, link: LinkKind, process: HostProcess, backend: HostProcess | None, console: Console,
        uid: int | None, give_back: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._run_dir = run_dir
        self._link = link
        self._process = process
        self._backend = backend
        self._console = console
        self._uid = uid
        self._give_back = give_back
        self._driver_ready = False

    @property
    def pid(self) -> int:
        """PID of QEMU."""
        return self._process.pid

    @property
    def resume_token(self) -> Mapping[str, str]:
        """What `QemuDriver.adopt` needs."""
        token = {"pid": str(self.pid), "start_time": str(self._process.start_time), "link": self._link.value}
        if self._uid is not None:
            token["uid"] = str(self._uid)
        if self._backend is not None:
            token |= {"backend_pid": str(self._backend.pid), "backend_start_time": str(self._backend.start_time)}
        return token

    async def dial(self) -> socket.socket:
        """Connects to the guest's end of the link; over vsock only once the guest's driver is up."""
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
            raise GuestUnreachable(f"the guest's vsock device cannot be asked: {error}") from error
        if not any(str(text).startswith(_DRIVER_OK) for text in status["status"]["statuses"]):
            raise GuestUnreachable("the guest's vsock driver is not up yet", reason="GUEST_BOOTING")
        self._driver_ready = True

    async def wait(self) -> ExitInfo:
        """Returns once QEMU has ended."""
        return await self._process.wait()

    async def stop(self) -> None:
        """Ends QEMU and its backend, and removes their sockets."""
        await self._process.kill()
        if self._backend is not None:
            await self._backend.kill()
        self._give_back()
        await self._console.aclose()
        for name in (*_SOCKETS, "vhost", "vsock"):
            (self._run_dir / f"{name}.sock").unlink(missing_ok=True)

    @asynccontextmanager
    async def _control(self) -> AsyncIterator[Qmp]:
        qmp = await Qmp.connect(str(self._run_dir / "qmp.sock"))
        try:
            yield qmp
        finally:
            qmp.close()

    async def snapshot(self, directory: Path) -> None:
        """Stops the VM and writes its device state; see `agent.daemon.vmm.driver.Vm`."""
        await self._save(directory, ram=False)

    async def save(self, directory: Path) -> None:
        """Stops the VM and writes its device state and RAM; see `agent.daemon.vmm.driver.Vm`."""
        await self._save(directory, ram=True)

    async def _save(self, directory: Path, *, ram: bool) -> None:
        if self._link is LinkKind.VSOCK:
            raise VmmUnsupported("a QEMU with a vsock device cannot be snapshotted", reason="SNAPSHOT_UNSUPPORTED")
        vmm_confinement.lend_path(self._uid, directory)
        async with self._control() as qmp:
            await qmp.execute("stop")
            await migration.save(qmp, directory, ram=ram)
        if self._uid is not None:
            await asyncio.to_thread(vmm_confinement.take_directory, directory, migration.FILES)

    async def pause(self) -> None:
        """Stops the CPUs."""
        async with self._control() as qmp:
            await qmp.execute("stop")

    async def resume(self) -> None:
        """Lets the CPUs go on."""
        async with self._control() as qmp:
            if not (await qmp.execute("query-status"))["running"]:
                await migration.give_up(qmp)
                await qmp.execute("cont")

    async def power_button(self) -> None:
        """Presses the ACPI power button."""
        async with self._control() as qmp:
            await qmp.execute("system_powerdown")

    def console_tail(self, limit_bytes: int) -> bytes:
        """Returns the end of the serial console."""
        return self._console.tail(limit_bytes)


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


class QemuDriver:
    """Starts VMs with the QEMU of this host; see `agent.daemon.vmm.driver.Driver`."""

    def __init__(self, options: VmmOptions, tools_dir: Path, probe: AcceleratorProbe) -> None:
        self._options = options
        self._tools_dir = tools_dir
        self._probe = probe
        self._info: VmmInfo | None = None
        self._binary = ""

    async def probe(self) -> VmmInfo:
        """Finds QEMU, checks its version, and chooses the accelerator."""
        if self._info is None:
            self._binary, version = await find_qemu(self._options.binary)
            accelerator, reason = await self._probe.choose(self._options.accelerator, self._binary, version)
            key = f"qemu {version} {accelerator} {cpu_key() if accelerator == 'kvm' else 'emulated'}"
            key += f" m{qemu_args.REVISION}"
            link = LinkKind.VSOCK if self._options.link == LinkKind.VSOCK else LinkKind.SERIAL
            reason = "; ".join(filter(None, (reason, self._options.note)))
            can_snapshot = link is LinkKind.SERIAL  # a vsock device cannot be frozen
            self._info = VmmInfo("qemu", version, accelerator, reason, key, link, can_snapshot)
        return self._info

    async def start(self, spec: VmSpec) -> QemuVm:
        """Starts QEMU paused, connects its console, lets it run."""
        info = await self.probe()
        backend = await self._start_backend(spec)
        try:
            return await self._start_qemu(spec, info.accelerator, backend)
        except BaseException:
            if backend is not None:
                await asyncio.shield(asyncio.ensure_future(backend.kill()))
            for name in ("vhost", "vsock"):
                (spec.run_dir / f"{name}.sock").unlink(missing_ok=True)
            raise

    async def _start_backend(self, spec: VmSpec) -> HostProcess | None:
        if spec.link is LinkKind.SERIAL or os.path.exists("/dev/vhost-vsock"):  # noqa: ASYNC240, PTH110  devtmpfs
            return None
        binary = vsock_backend.find_binary(self._tools_dir)
        return await vsock_backend.start(binary, spec.run_dir, qemu_args.GUEST_CID, spec.cgroup)

    async def _start_qemu(self, spec: VmSpec, accelerator: str, backend: HostProcess | None) -> QemuVm:
        give_back = functools.partial(vmm_confinement.take_back, spec)
        names = [name for name in _SOCKETS if name != "link" or spec.link is LinkKind.SERIAL]
        listeners = {name: sockets.listen(spec.run_dir / f"{name}.sock") for name in names}
        process: HostProcess | None = None
        console: Console | None = None
        tap_fd: int | None = None
        try:
            if spec.nic is not None:
                tap_fd = await open_tap(spec.nic.tap, spec.netns)
            vmm_confinement.lend(spec)
            argv = self._argv(spec, accelerator, backend, listeners, tap_fd)
            devices = ["/dev/null", "/dev/urandom"] + (["/dev/kvm"] if accelerator == "kvm" else [])
            devices += ["/dev/vhost-vsock"] if spec.link is LinkKind.VSOCK and backend is None else []
            sockets_seen = [] if backend is None else [spec.run_dir / "vhost.sock"]
            for path in sockets_seen:
                vmm_confinement.lend_path(spec.uid, path)
            fds = [sock.fileno() for sock in listeners.values()] + ([] if tap_fd is None else [tap_fd])
            process = await host_process.spawn(
                vmm_confinement.confinement_of(spec).argv(argv),
                netns=spec.netns,
                stderr_path=spec.run_dir / "vmm.log",
                pass_fds=fds,
                seen=vmm_confinement.view_of(spec, self._binary, devices, writable=sockets_seen),
                cgroup=spec.cgroup,
            )
            for sock in listeners.values():
                sock.close()  # QEMU alone listens now: its death closes what is connected
            console = Console(spec.run_dir, spec.console_limit_bytes)
            await _run(process, console, spec)
            await process.placed()
        except BaseException:
            if process is not None:
                await asyncio.shield(asyncio.ensure_future(process.kill()))
            if console is not None:
                await console.aclose()
            for name, sock in listeners.items():
                sock.close()
                (spec.run_dir / f"{name}.sock").unlink(missing_ok=True)
            give_back()
            raise
        finally:
            if tap_fd is not None:
                os.close(tap_fd)
        return QemuVm(spec.run_dir, spec.link, process, backend, console, spec.uid, give_back)

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
        """Finds a VM that an earlier agent started."""
        try:
            process = _adopt(token, "", run_dir / "vmm.log")
            backend = _adopt(token, "backend_", run_dir / "vsock.log") if "backend_pid" in token else None
            link = LinkKind(token.get("link", "serial"))
        except ValueError:
            return None
        if process is None:
            if backend is not None:
                await backend.kill()
            return None
        try:
            console = Console(run_dir, _CONSOLE_FOR_ADOPTED_BYTES)
        except OSError:  # its directory is gone, and so is every way to it
            for left in filter(None, (process, backend)):
                await left.kill()
            return None
        with contextlib.suppress(GuestUnreachable):
            console.attach(await sockets.connect(run_dir / "console.sock"))
        return QemuVm(run_dir, link, process, backend, console, int(token["uid"]) if "uid" in token else None)


def _adopt(token: Mapping[str, str], prefix: str, stderr_path: Path) -> HostProcess | None:
    pid, started = int(token.get(f"{prefix}pid", "0")), int(token.get(f"{prefix}start_time", "0"))
    return host_process.adopt(pid, started, stderr_path)


async def _run(process: HostProcess, console: Console, spec: VmSpec) -> None:
    """Connects the console, restores, and lets the paused VM run. :raises VmmError: with what QEMU said if it ended."""
    try:
        console.attach(await sockets.connect(spec.run_dir / "console.sock"))
        qmp = await Qmp.connect(str(spec.run_dir / "qmp.sock"))
        try:
            if spec.restore_from is not None:
                await migration.load(qmp, spec.restore_from, ram=spec.memory_file is None)
            if spec.stands_still:
                return
            await qmp.execute("cont")
            if spec.restore_from is not None:  # only now: the disks are not QEMU's before
                await _announce_sizes(qmp, spec)
        finally:
            qmp.close()
    except (VmmError, GuestUnreachable) as error:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):  # a QEMU that refused its arguments is about to end
                exit_info = await process.wait()
                raise VmmError(
                    f"QEMU {exit_info.describe()} at once: {exit_info.stderr_tail or 'it gave no reason'}",
                    reason="VMM_NOT_STARTED",
                ) from error
        raise VmmError(f"QEMU does not answer: {error.message}", reason="VMM_NOT_STARTED") from error


async def _announce_sizes(qmp: Qmp, spec: VmSpec) -> None:
    """Tells the guest's driver how large the writable disks are now: a resize to the present size does so."""
    for disk in spec.disks:
        if not disk.read_only:
            size = await asyncio.to_thread(os.path.getsize, disk.path)
            await qmp.execute("block_resize", node_name=f"d-{disk.serial}", size=size)


async def find_qemu(configured: str) -> tuple[str, str]:
    """Returns (path, version) of the QEMU to use. :raises VmmError: there is none, or it is too old."""
    binary = configured or shutil.which(_BINARY) or ""
    if not binary:
        raise VmmError(
            f"{_BINARY} is not installed: run `./bootstrap.sh setup`, or set vmm.binary", reason="VMM_MISSING"
        )
    try:
        output = await _version_text(binary)
    except (VmmError, OSError) as error:  # a TimeoutError is an OSError
        raise VmmError(f"{binary} cannot be run: {error}; check vmm.binary", reason="VMM_MISSING") from error
    match = re.search(rb"version (\d+)\.(\d+)\.(\d+)", output)
    if match is None:
        raise VmmError(f"{binary} does not say which version of QEMU it is", reason="VMM_UNSUPPORTED")
    major, minor, patch = (int(number) for number in match.groups())
    if (major, minor) < _MIN_VERSION:
        needed = ".".join(str(number) for number in _MIN_VERSION)
        raise VmmError(
            f"{binary} is QEMU {major}.{minor}; {needed} or newer is needed: run `./bootstrap.sh setup`",
            reason="VMM_UNSUPPORTED",
        )
    return binary, f"{major}.{minor}.{patch}"


async def _version_text(binary: str) -> bytes:
    async with stdout_of([binary, "--version"], stderr=2) as output, asyncio.timeout(_VERSION_TIMEOUT_S):
        return await output.read()
    raise AssertionError("unreachable: nothing above suppresses exceptions")
