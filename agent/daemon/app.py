"""Composition root of the daemon: settings, state, VMM, network, sandboxes, server, signals."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from agent.common import systemd, telemetry
from agent.common.background import QUICK, Backoff, Supervisor
from agent.common.config.daemon import ApiSettings, MetricsSettings, TracingSettings
from agent.common.config.loading import merge_reloaded
from agent.common.config.paths import Paths
from agent.common.config.settings import Settings
from agent.common.errors import ConfigError
from agent.common.telemetry import BACKGROUND_FAILING, BACKGROUND_FAILURES, DEGRADED, LoopTelemetry, log
from agent.daemon.host.cgroup import Cgroups
from agent.daemon.host.uid_pool import UidPool
from agent.daemon.network.operator_policy import OperatorPolicy
from agent.daemon.network.sandbox_network import SandboxNetwork
from agent.daemon.rpc.server import ApiServer
from agent.daemon.sandbox.capacity.node import Node
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.record_network import RecordNetwork
from agent.daemon.sandbox.service import SandboxService
from agent.daemon.sandbox.state.denials import Denials
from agent.daemon.sandbox.state.events import Events
from agent.daemon.sandbox.state.store import Store, lock_directory
from agent.daemon.sandbox.templates.catalog import Templates
from agent.daemon.storage.disks import DiskMaker
from agent.daemon.storage.images import ImageStore
from agent.daemon.storage.secrets.secret_store import SecretStore
from agent.daemon.storage.secrets.vault import Vault
from agent.daemon.storage.volumes import Volumes
from agent.daemon.vmm.driver import VmmInfo
from agent.daemon.vmm.select import choose_driver

_STOP_GRACE_S = 2.0
# Each attempt keeps all CPUs of a guest busy: frequent retries would exhaust a host that is short of memory or disk.
_PREWARM_BACKOFF = Backoff(first_s=5.0, last_s=600.0, settle_s=120.0)
_STATUS_INTERVAL_S = 5.0  # of notifications to systemd during a drain


def _open_templates(host: HostServices, vmm: VmmInfo) -> Templates | None:
    if not host.settings.templates.enabled or not vmm.can_snapshot:
        return None
    templates = Templates(host)
    templates.open()
    return templates


def _prepare_process() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core of the agent, or of a VMM, has secrets and guests in it
    os.umask(0o022)  # VMMs run as other users and read images and templates; secret files get a mode of their own


def _open_cgroups(settings: Settings) -> Cgroups:
    cgroups = Cgroups.open(settings.cgroups.parent)
    for sentence in cgroups.degraded:
        log.warning("host feature missing", why=sentence)
    DEGRADED.set(len(cgroups.degraded))
    return cgroups


@asynccontextmanager
async def agent(settings: Settings, listener: socket.socket | None = None) -> AsyncIterator[ApiServer]:
    """Run an agent inside the context; leaving it is an orderly stop.

    :param listener: of the API's unix socket, if systemd has opened it already.
    :raises AgentError: the agent cannot start; the message says what to do.
    """
    paths, keep = Paths.of(settings), settings.sandbox.on_stop == "keep"
    for directory in (paths.run_dir, paths.state_dir):
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        for path in (paths.lock, paths.run_lock):
            stack.callback(os.close, lock_directory(path))
        store = Store(paths.database, paths.sandboxes_state)
        stack.push_async_callback(store.aclose)
        records = await store.open()
        images = ImageStore(settings.images.images_dir)
        boot_files = await asyncio.to_thread(images.boot_files, settings.images.default_image)
        driver = await choose_driver(settings, boot_files)
        vmm = await driver.probe()
        supervisor = await stack.enter_async_context(Supervisor(LoopTelemetry(BACKGROUND_FAILURES, BACKGROUND_FAILING)))
        events = Events()
        secrets, denials = SecretStore(Vault(paths.secrets)), Denials(events.publish_denial)
        secrets.open()
        network = SandboxNetwork(settings, paths, secrets, denials, supervisor)
        await network.start()
        stack.push_async_callback(network.aclose, keep=keep)
        volumes = Volumes(paths.volumes)
        await asyncio.to_thread(volumes.open)
        cgroups = _open_cgroups(settings)
        stack.callback(cgroups.close)
        uids = UidPool(settings.vmm.uid_base)
        by_record = RecordNetwork(network, OperatorPolicy.from_settings(settings.egress), denials)
        disks = DiskMaker(paths.disk_templates)
        host = HostServices(settings, paths, driver, disks, by_record, secrets, volumes, uids, cgroups)
        node = Node(settings, vmm, supervisor, cgroups.degraded)
        templates = _open_templates(host, vmm)
        sandboxes = SandboxService.build(host, images, node, store, events, supervisor, templates)
        await sandboxes.recovery.run(records)
        await network.remove_unused_uplink()
        sandboxes.drain.restore()
        stack.push_async_callback(sandboxes.stop, keep=keep)
        server = ApiServer(settings, sandboxes, supervisor, listener)
        stack.push_async_callback(server.stop, _STOP_GRACE_S)
        for loop in (
            supervisor.start("template-prewarm", sandboxes.prewarm_templates, _PREWARM_BACKOFF),
            supervisor.start("drop-counters", sandboxes.count_drops),
            supervisor.start("expiry", sandboxes.expiry.run, QUICK),
        ):
            stack.push_async_callback(loop.stop)
        await server.start()
        yield server


async def run(settings: Settings, read: Callable[[], Settings] | None = None) -> None:
    """Run until SIGTERM or SIGINT; a second one ends the process without cleanup. SIGHUP reloads the settings.

    :param read: reads the settings again; None: SIGHUP is ignored.
    """
    _prepare_process()
    telemetry.setup(settings.log, settings.metrics, settings.tracing, settings.node.name)
    stop, reload = asyncio.Event(), asyncio.Event()
    _handle_signals(stop, reload)
    async with agent(settings, systemd.listeners().get("api")) as server:
        log.info("ready", socket=str(server.socket_path), tcp_port=server.tcp_port)
        systemd.notify("READY=1")
        loops = [server.supervisor.start("systemd-watchdog", systemd.keep_watchdog, QUICK)]
        if read is not None:
            reloader = _Reloader(server, settings, read, reload)
            loops.append(server.supervisor.start("reload", reloader.run))
        await stop.wait()
        log.info("stopping", sandboxes=settings.sandbox.on_stop)
        systemd.notify("STOPPING=1")
        if settings.sandbox.on_stop == "drain":
            await _drain(server, settings.sandbox.drain_timeout_s)
        for supervised in loops:
            await supervised.stop()


def _handle_signals(stop: asyncio.Event, reload: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def on_stop_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_stop_signal)
    loop.add_signal_handler(signal.SIGHUP, reload.set)


async def delete_all(settings: Settings) -> None:
    """Delete all sandboxes that an earlier agent left.

    :raises AgentError: an agent runs, or this one cannot start.
    """
    sandbox = dataclasses.replace(settings.sandbox, on_stop="delete")
    # Without templates and TCP port: the agent ends at once.
    templates, api = dataclasses.replace(settings.templates, enabled=False), ApiSettings()
    _prepare_process()
    telemetry.setup(settings.log, MetricsSettings(), TracingSettings(), settings.node.name)
    async with agent(dataclasses.replace(settings, sandbox=sandbox, templates=templates, api=api)):
        pass


class _Reloader:
    """Reloads the settings whenever `requested` is set. Invalid settings change nothing."""

    def __init__(
        self, server: ApiServer, present: Settings, read: Callable[[], Settings], requested: asyncio.Event
    ) -> None:
        self._server = server
        self._present = present
        self._read = read
        self._requested = requested

    async def run(self) -> None:
        """Reload until cancelled. Can be started again: the settings in force are an attribute."""
        while True:
            await self._requested.wait()
            self._requested.clear()
            systemd.notify_reloading()
            try:
                self._reload()
            except ConfigError as error:
                log.error("invalid settings: the present ones stay in force", error=error.message)
            finally:
                systemd.notify("READY=1")  # without it, systemd would end the agent after a timeout

    def _reload(self) -> None:
        wanted = self._read()
        self._server.reload_certificates()
        self._present, changed, waiting = merge_reloaded(self._present, wanted)
        telemetry.set_log_level(self._present.log.level)
        self._server.sandboxes.reconfigure(self._present)
        log.info("settings reloaded", changed=changed, need_a_restart=waiting)


async def _drain(server: ApiServer, timeout_s: float) -> None:
    """Wait until no sandbox is left, and have systemd wait as well."""
    sandboxes = server.sandboxes
    await sandboxes.drain.begin(timeout_s, why="the agent is stopping", keep=False)

    async def notify() -> None:
        while True:
            left = len(sandboxes.registry)
            systemd.notify(
                f"STATUS=draining: {left} sandboxes left\nEXTEND_TIMEOUT_USEC={int(_STATUS_INTERVAL_S * 3e6)}"
            )
            await asyncio.sleep(_STATUS_INTERVAL_S)

    notifying = server.supervisor.start("drain-status", notify, QUICK)
    async for _ in sandboxes.drain.progress():
        pass
    await notifying.stop()
