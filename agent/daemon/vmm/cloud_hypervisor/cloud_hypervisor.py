"""Cloud Hypervisor driver: starts and adopts its processes; see `agent.daemon.vmm.driver.Driver`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
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
from agent.daemon.vmm.cloud_hypervisor import binary, config
from agent.daemon.vmm.cloud_hypervisor.layout import Layout
from agent.daemon.vmm.cloud_hypervisor.pipes import Log, VmmEvents
from agent.daemon.vmm.cloud_hypervisor.vm import CloudHypervisorVm
from agent.daemon.vmm.driver import LinkKind, VmmInfo, VmmOptions, VmSpec
from agent.daemon.vmm.host_features import cpu_key, landlock_works

_CONSOLE_LIMIT_OF_ADOPTED_BYTES = 1 << 20
_RESUMED_TIMEOUT_S = 10.0
_EXIT_TIMEOUT_S = 0.5  # a VMM that could not start is about to end
_DEVICES = ("/dev/null", "/dev/urandom", "/dev/kvm")


def trial(program: str, kernel: Path, initramfs: Path, cmdline: str) -> list[str]:
    """Return the command line that boots a kernel with its console on stdout, for `AcceleratorProbe`."""
    return [
        program, "--kernel", str(kernel), "--initramfs", str(initramfs), "--cmdline", cmdline,
        "--cpus", "boot=1,nested=off", "--memory", "size=256M", "--serial", "tty", "--console", "off",
    ]  # fmt: skip


class CloudHypervisorDriver:
    """Starts VMs with Cloud Hypervisor v53.

    :param tools_dir: directory in which the binary may lie.
    :param probe: created with `trial`.
    :param landlock: whether VMMs confine themselves by Landlock, too; None: where the kernel has it.
    """

    def __init__(
        self,
        options: VmmOptions,
        tools_dir: Path,
        probe: AcceleratorProbe,
        *,
        landlock: bool | None = None,
    ) -> None:
        self._options = options
        self._tools_dir = tools_dir
        self._probe = probe
        self._landlock = landlock_works() if landlock is None else landlock
        self._info: VmmInfo | None = None
        self._binary = ""

    async def probe(self) -> VmmInfo:
        """Find Cloud Hypervisor, check its version, and that a kernel boots in it."""
        if self._options.link == LinkKind.SERIAL:
            raise VmmError(
                "Cloud Hypervisor has no virtio-serial port; set vmm.link to auto or vsock", reason="VMM_UNSUPPORTED"
            )
        if self._info is None:
            self._binary, version = await binary.find(self._options.binary, self._tools_dir)
            accelerator, reason = await self._probe.choose(
                self._options.accelerator, self._binary, f"{binary.NAME} {version}"
            )
            if accelerator != "kvm":
                raise VmmError(
                    f"Cloud Hypervisor runs on KVM only, and {reason}; use vmm.driver qemu on this host",
                    reason="KVM_UNUSABLE",
                )
            key = f"{binary.NAME} {version} {accelerator} {cpu_key()}"
            reason = "; ".join(filter(None, (reason, self._options.note)))
            self._info = VmmInfo(binary.NAME, version, accelerator, reason, key, LinkKind.VSOCK)
        return self._info

    async def start(self, spec: VmSpec) -> CloudHypervisorVm:
        """Start a VMM, boot or restore its VM, and connect its console."""
        config.check(spec)
        await self.probe()
        layout = Layout(spec.run_dir)
        async with AsyncExitStack() as undo:
            undo.callback(layout.remove)
            layout.create(vmm_confinement.confinement_of(spec))
            console, log, events = _open_pipes(layout, spec.console_limit_bytes)
            for pipe in (console.pipe, log.pipe, events.pipe):
                undo.callback(pipe.close)
            reclaim = functools.partial(vmm_confinement.reclaim, spec)
            undo.callback(reclaim)
            vmm_confinement.grant(spec)
            process = await self._spawn(spec, layout, console, log, events)
            undo.push_async_callback(_kill, process)
            vm = CloudHypervisorVm(
                layout,
                process,
                console,
                log,
                events,
                is_template=config.is_template(spec),
                reclaim=reclaim,
                uid=spec.uid,
            )
            try:
                await self._bring_up(vm, spec, layout)
                await process.joined_cgroup()
            except (VmmError, GuestUnreachable) as error:
                raise await _explain_failure(vm, error) from error
            undo.pop_all()
        return vm

    async def _spawn(self, spec: VmSpec, layout: Layout, console: Log, log: Log, events: VmmEvents) -> HostProcess:
        with (
            sockets.listen(layout.api) as listener,
            console.pipe.writer() as stdout,
            log.pipe.writer() as stderr,
            events.pipe.writer() as event_fd,
        ):
            argv = [
                self._binary,
                *("--api-socket", f"fd={listener.fileno()}"),
                *("--event-monitor", f"fd={event_fd}"),
                *("--seccomp", "true"),
                *self._options.extra_args,
            ]
            # The VMM alone listens from here on, so its end closes all connections.
            return await host_process.spawn(
                vmm_confinement.confinement_of(spec).argv(argv),
                netns=spec.netns,
                stderr_path=layout.log,
                pass_fds=[listener.fileno(), event_fd],
                output_fds=(stdout, stderr),
                root_view=vmm_confinement.root_view_of(
                    spec, self._binary, _DEVICES, read_only=self._options.visible, writable=[spec.run_dir]
                ),
                cgroup=spec.cgroup,
            )

    async def _bring_up(self, vm: CloudHypervisorVm, spec: VmSpec, layout: Layout) -> None:
        binary.require_version(await vm.api.ping(), self._binary)
        with contextlib.ExitStack() as opened:
            taps = {}
            if spec.nic is not None:
                taps[config.NET_ID] = await open_tap(spec.nic.tap, spec.netns)
                opened.callback(os.close, taps[config.NET_ID])
            if spec.restore_from is None:
                await self._boot(vm, spec, taps)
            else:
                await self._restore(vm, spec, layout, spec.restore_from, taps)

    async def _boot(self, vm: CloudHypervisorVm, spec: VmSpec, taps: Mapping[str, int]) -> None:
        await vm.api.create(config.vm_config(spec, landlock=self._landlock))
        for fd in taps.values():
            assert spec.nic is not None
            await vm.api.add_net(config.net(spec.nic, spec.limits), fd)
        await vm.api.boot()

    async def _restore(
        self, vm: CloudHypervisorVm, spec: VmSpec, layout: Layout, snapshot: Path, taps: Mapping[str, int]
    ) -> None:
        ram = spec.memory_file is None
        zone = ram and await asyncio.to_thread(config.has_zone, snapshot)
        text = json.dumps(config.restore_config(spec, landlock=self._landlock, zone=zone)).encode()
        layout.create_restore(text, snapshot, vmm_confinement.confinement_of(spec))
        await vm.api.restore(layout.restore, taps, resume=not spec.start_paused, ram=ram)
        # "vm restored" comes before the CPUs start.
        await vm.events.wait_for("vm restored" if spec.start_paused else "vm resumed", _RESUMED_TIMEOUT_S)
        layout.remove_restore()
        if spec.start_paused:
            return  # a saved sandbox keeps its disks and their sizes
        for disk in spec.disks:
            if not disk.read_only:
                await vm.announce_disk_size(disk.serial, await asyncio.to_thread(os.path.getsize, disk.path))

    async def adopt(self, id: str, run_dir: Path, token: Mapping[str, str]) -> CloudHypervisorVm | None:  # noqa: ARG002
        """Return the VM that an earlier agent started; None if it has ended."""
        layout = Layout(run_dir)
        try:
            pid, started = int(token.get("pid", "0")), int(token.get("start_time", "0"))
        except ValueError:
            return None
        process = host_process.adopt(pid, started, layout.log)
        if process is None:
            return None
        try:
            console, log, events = _open_pipes(layout, _CONSOLE_LIMIT_OF_ADOPTED_BYTES)
        except OSError:  # the run directory is gone, and with it all sockets
            await process.kill()
            return None
        return CloudHypervisorVm(
            layout, process, console, log, events, is_template=token.get("template") == "yes",
            uid=int(token["uid"]) if "uid" in token else None,
        )  # fmt: skip


def _open_pipes(layout: Layout, console_limit_bytes: int) -> tuple[Log, Log, VmmEvents]:
    console = Log(layout.console_pipe, layout.console, console_limit_bytes)
    return console, Log(layout.log_pipe, layout.log), VmmEvents(layout.events)


async def _kill(process: HostProcess) -> None:
    await asyncio.shield(asyncio.ensure_future(process.kill()))


async def _explain_failure(vm: CloudHypervisorVm, error: VmmError | GuestUnreachable) -> VmmError:
    """Return the error for a VM that did not start; if its VMM has ended, with the VMM's last output."""
    alive = error.reason in ("VMM_API_REFUSED", "VMM_UNSUPPORTED", "TAP_FAILED", "SNAPSHOT_FAILED")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0 if alive else _EXIT_TIMEOUT_S):
            ended = await vm.wait()
            return VmmError(
                f"Cloud Hypervisor {ended.describe()} at once: {ended.stderr_tail or 'it gave no reason'}",
                reason="VMM_NOT_STARTED",
            )
    if alive and isinstance(error, VmmError) and error.reason != "VMM_API_REFUSED":
        return error
    return VmmError(f"Cloud Hypervisor did not start the VM: {error.message}", reason="VMM_NOT_STARTED")
