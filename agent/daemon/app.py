"""The daemon, put together: settings, state, VMM, manager, servers, signals."""

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
from agent.daemon.network.sandbox_network import SandboxNetwork
from agent.daemon.rpc.server import ApiServer
from agent.daemon.sandbox.capacity.node import Node
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.recovery import reconcile
from agent.daemon.sandbox.service import Manager
from agent.daemon.sandbox.state.store import Store, lock_directory
from agent.daemon.sandbox.templates.catalog import Templates
from agent.daemon.storage.disks import DiskMaker
from agent.daemon.storage.images import ImageStore
from agent.daemon.storage.secrets.vault import Vault
from agent.daemon.storage.volumes import Volumes
from agent.daemon.vmm.driver import VmmInfo
from agent.daemon.vmm.select import choose_driver

_STOP_GRACE_S = 2.0
# Each attempt takes all CPUs of a guest: a host that is short of something is not worn out.
_PREWARM_BACKOFF = Backoff(first_s=5.0, last_s=600.0, settle_s=120.0)
_NOTICE_S = 5.0  # between two notices to systemd during a drain


def _templates(host: HostServices, vmm: VmmInfo) -> Templates | None:
    if not host.settings.templates.enabled or not vmm.can_snapshot:
        return None
    templates = Templates(host)
    templates.open()
    return templates


def _prepare_process() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core of ours, or of a VMM, has secrets and guests in it
    os.umask(0o022)  # VMMs, other users than we, read images and templates; what is secret says so when it is made


@asynccontextmanager
async def agent(settings: Settings, listener: socket.socket | None = None) -> AsyncIterator[ApiServer]:
    """Runs an agent inside the context; leaving it is an orderly stop.

    :param listener: of the API's unix socket, if somebody has made it already.
    :raises AgentError: it cannot start; the message says what to do.
    """
    paths = Paths.of(settings)
    for directory in (paths.run_dir, paths.state_dir):
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    store = Store(paths.database, paths.sandboxes_state)
    locks: list[int] = []
    started = AsyncExitStack()
    try:
        for path in (paths.lock, paths.run_lock):
            locks.append(lock_directory(path))
        records = await store.open()
        images = ImageStore(settings.images.images_dir)
        driver = await choose_driver(settings, images)
        vmm = await driver.probe()
        supervisor = await started.enter_async_context(
            Supervisor(LoopTelemetry(BACKGROUND_FAILURES, BACKGROUND_FAILING))
        )
        network = SandboxNetwork(settings, paths, Vault(paths.secrets), supervisor)
        await network.start()
        started.push_async_callback(network.aclose, keep=settings.sandbox.on_stop == "keep")
        volumes = Volumes(paths.volumes)
        await asyncio.to_thread(volumes.open)
        cgroups = Cgroups.open(settings.cgroups.parent)
        for sentence in cgroups.degraded:
            log.warning("degraded", why=sentence)
        DEGRADED.set(len(cgroups.degraded))
        started.callback(cgroups.close)
        uids = UidPool(settings.vmm.uid_base)
        host = HostServices(settings, paths, driver, DiskMaker(paths.disk_templates), network, volumes, uids, cgroups)
        templates = _templates(host, vmm)
        node = Node(settings, vmm, supervisor, cgroups.degraded)
        manager = Manager(host, images, node, store, templates, supervisor=supervisor)
        network.on_denial = manager.on_denial
        await reconcile(host, manager, store, records)
        await network.settle()
        manager.drain.restore()
        server = ApiServer(settings, manager, supervisor, listener)
        loops = (
            supervisor.start("template-prewarm", manager.prepare_templates, _PREWARM_BACKOFF),
            supervisor.start("drop-counters", manager.count_drops),
            supervisor.start("expiry", manager.keep_lifetimes, QUICK),
        )
        try:
            await server.start()
            yield server
        finally:
            for loop in loops:
                await loop.stop()
            await server.stop(_STOP_GRACE_S)
            await manager.stop(keep=settings.sandbox.on_stop == "keep")
    finally:
        await started.aclose()
        await store.aclose()
        for lock in locks:
            os.close(lock)


async def run(settings: Settings, read: Callable[[], Settings] | None = None) -> None:
    """Runs until SIGTERM or SIGINT; a second one ends the process without cleaning up. SIGHUP reads the settings anew.

    :param read: reads them; None: there is nothing to read, as SIGHUP is no more than a terminal that closes.
    """
    _prepare_process()
    telemetry.setup(settings.log, settings.metrics, settings.tracing, settings.node.name)
    stop, reload = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
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


async def delete_all(settings: Settings) -> None:
    """Ends and removes all sandboxes that an earlier agent left. :raises AgentError: one runs, or it cannot start."""
    sandbox = dataclasses.replace(settings.sandbox, on_stop="delete")
    # Nothing is started for it: no template, no port.
    templates, api = dataclasses.replace(settings.templates, enabled=False), ApiSettings()
    _prepare_process()
    telemetry.setup(settings.log, MetricsSettings(), TracingSettings(), settings.node.name)
    async with agent(dataclasses.replace(settings, sandbox=sandbox, templates=templates, api=api)):
        pass


class _Reloader:
    """Reads the settings again whenever `wanted` is set. Wrong ones change nothing."""

    def __init__(
        self, server: ApiServer, present: Settings, read: Callable[[], Settings], wanted: asyncio.Event
    ) -> None:
        self._server = server
        self._present = present
        self._read = read
        self._wanted = wanted

    async def run(self) -> None:
        """Reload for ever. May be started again: the settings in force are kept here."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            systemd.notify_reloading()
            try:
                self._reload()
            except ConfigError as error:
                log.error("the settings stay as they were", error=error.message)
            finally:
                systemd.notify("READY=1")  # or systemd would wait for it, and then end the agent

    def _reload(self) -> None:
        wanted = self._read()
        self._server.reload_certificates()
        self._present, changed, waiting = merge_reloaded(self._present, wanted)
        telemetry.set_log_level(self._present.log.level)
        self._server.manager.reconfigure(self._present)
        log.info("settings read again", changed=changed, need_a_restart=waiting)


async def _drain(server: ApiServer, timeout_s: float) -> None:
    """Waits until there is no sandbox left; systemd is told to wait as long."""
    manager = server.manager
    await manager.drain.begin(timeout_s, why="the agent is stopping", keep=False)

    async def tell() -> None:
        while True:
            left = len(manager.list())
            systemd.notify(f"STATUS=draining: {left} sandboxes left\nEXTEND_TIMEOUT_USEC={int(_NOTICE_S * 3e6)}")
            await asyncio.sleep(_NOTICE_S)

    telling = server.supervisor.start("drain-status", tell, QUICK)
    async for _ in manager.drain.progress():
        pass
    await telling.stop()
