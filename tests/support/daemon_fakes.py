"""A host without virtual machines: what the daemon drives, in memory, with faults on demand."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from agent.common.aio import run_to_completion
from agent.common.background import Supervisor
from agent.common.config.daemon import NodeSettings, PathSettings, SandboxSettings, TemplateSettings
from agent.common.config.egress import EgressSettings
from agent.common.config.paths import Paths
from agent.common.config.settings import Settings
from agent.common.errors import GuestUnreachable, HostError, NotFound
from agent.common.model import Lifetime, SandboxSpec, SecretSpec, State
from agent.common.policy.policy import Policy
from agent.common.policy.reasons import Reason
from agent.common.telemetry import step
from agent.daemon.guestlink.channel import Channel
from agent.daemon.host.cgroup import Cgroups
from agent.daemon.host.process import ExitInfo
from agent.daemon.host.uid_pool import UidPool
from agent.daemon.network.operator_policy import OperatorPolicy
from agent.daemon.network.sandbox_network import KernelState, SandboxNetwork
from agent.daemon.sandbox.capacity.node import Node
from agent.daemon.sandbox.machine import guest_setup
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.record_network import RecordNetwork
from agent.daemon.sandbox.service import SandboxService
from agent.daemon.sandbox.state.denials import Denials
from agent.daemon.sandbox.state.events import Events
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.store import Store
from agent.daemon.sandbox.templates.catalog import Templates
from agent.daemon.storage.disks import DiskMaker
from agent.daemon.storage.images import Artefact, Image, ImageStore
from agent.daemon.storage.secrets.secret_store import SecretStore
from agent.daemon.storage.volumes import Volumes
from agent.daemon.vmm.driver import Vm, VmmInfo, VmSpec
from guest.wire import Frame

MIB = 1 << 20
PHASES = ("disk", "netns", "vmm.start", "dial", "configure")
OPERATOR = OperatorPolicy.from_settings(EgressSettings())
VMM = VmmInfo("fake", "1.0", "tcg", "it is a fake")


class World:
    """What exists on the fake host, and what goes wrong there: `faults` raise at a phase, `hangs` wait there."""

    def __init__(self) -> None:
        self.namespaces: set[str] = set()
        self.vms: dict[str, FakeVm] = {}
        self.channels: list[FakeChannel] = []
        self.answers: dict[str, dict[str, Any]] = {}
        self.script: list[Any] = []
        self.streams: list[FakeStream] = []
        self.faults: dict[str, Exception] = {}
        self.hangs: set[str] = set()
        self.reached: dict[str, asyncio.Event] = {phase: asyncio.Event() for phase in (*PHASES, "save")}
        self.remove_faults = 0
        self.starts = 0
        self.clone_faults: list[Exception] = []  # each ends one clone of a finished template

    async def pass_through(self, phase: str) -> None:
        self.reached[phase].set()
        if phase in self.faults:
            raise self.faults[phase]
        while phase in self.hangs:  # noqa: ASYNC110  a test lets it go on by taking it out
            await asyncio.sleep(0.005)

    async def make_namespace(self, name: str) -> None:
        self.namespaces.add(name)
        await asyncio.sleep(0.001 if "netns" in self.hangs else 0)
        if "netns" in self.faults:
            self.namespaces.discard(name)
        self.reached["netns"].set()
        if "netns" in self.faults:
            raise self.faults["netns"]

    async def remove_namespace(self, name: str) -> None:
        if self.remove_faults:
            self.remove_faults -= 1
            raise HostError("busy")
        self.namespaces.discard(name)


class FakeVm:
    """A VM that lives until it is stopped or `die` is called."""

    def __init__(self, world: World, sandbox_id: str) -> None:
        self.world = world
        self.id = sandbox_id
        self.ended: asyncio.Future[ExitInfo] = asyncio.get_running_loop().create_future()
        self.running = True
        world.vms[sandbox_id] = self

    @property
    def pid(self) -> int:
        return 1

    @property
    def resume_token(self) -> Mapping[str, str]:
        return {"vm": self.id}

    async def dial(self) -> Any:
        await self.world.pass_through("dial")
        return self

    async def wait(self) -> ExitInfo:
        return await asyncio.shield(self.ended)

    async def stop(self) -> None:
        self.die()

    def die(self) -> None:
        if not self.ended.done():
            self.ended.set_result(ExitInfo(None, 9, ""))
        self.world.vms.pop(self.id, None)

    async def snapshot(self, directory: Path) -> None:
        (directory / "state").write_bytes(b"frozen")

    async def save(self, directory: Path) -> None:
        self.running = False
        await self.world.pass_through("save")
        (directory / "state").write_bytes(b"all of it")

    async def pause(self) -> None:
        self.running = False

    async def resume(self) -> None:
        self.running = True

    async def power_button(self) -> None:
        self.die()

    def console_tail(self, limit_bytes: int) -> bytes:
        return b"Kernel panic - not syncing\x1b[0m\n"[-limit_bytes:]


class FakeChannel:
    """A guest that answers `sys.*` calls."""

    def __init__(self, vm: FakeVm) -> None:
        self.vm = vm
        self.lost: asyncio.Future[GuestUnreachable] = asyncio.get_running_loop().create_future()
        self.calls: list[tuple[str, dict[str, object]]] = []
        self.idle = 0.0
        vm.world.channels.append(self)

    @classmethod
    async def open(cls, vm: FakeVm, *, fresh: bool = True) -> FakeChannel:
        return cls(vm)

    def idle_s(self) -> float:
        return self.idle

    async def call(self, op: str, /, **fields: object) -> dict[str, Any]:
        self.calls.append((op, fields))
        if op == "sys.configure":
            await self.vm.world.pass_through("configure")
            return {"phases": []}
        return self.vm.world.answers.get(op, {"configured": True})

    @asynccontextmanager
    async def stream(self, op: str, /, **fields: object) -> AsyncIterator[FakeStream]:
        self.calls.append((op, fields))
        made = FakeStream(list(self.vm.world.script))
        self.vm.world.streams.append(made)
        try:
            yield made
        finally:
            made.end()

    async def aclose(self) -> None:
        if not self.lost.done():
            self.lost.set_result(GuestUnreachable("closed"))


class FakeStream:
    """A call whose answers are a script: frames, errors to raise, or a number of frames to wait for from the client."""

    def __init__(self, script: list[Any]) -> None:
        self.script = script
        self.sent: list[tuple[str, Any]] = []
        self.changed = asyncio.Event()
        self.ended = asyncio.Event()

    async def recv(self) -> Any:
        if not self.script:
            return None
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        if isinstance(step, int):
            while len(self.sent) < step:
                if self.ended.is_set():
                    raise GuestUnreachable("the guest ended the call without an answer")
                self.changed.clear()
                await self.changed.wait()
            return await self.recv()
        return step

    def _note(self, kind: str, value: Any) -> None:
        self.sent.append((kind, value))
        self.changed.set()

    async def send(self, kind: Frame, data: bytes) -> None:
        self._note(kind.name, data)

    async def send_json(self, value: dict[str, object]) -> None:
        self._note("EVENT", value)

    async def send_eof(self) -> None:
        self._note("EOF", b"")

    def end(self) -> None:
        self.ended.set()
        self.changed.set()


class FakeDriver:
    def __init__(self, world: World) -> None:
        self.world = world
        self.info = VMM

    async def probe(self) -> VmmInfo:
        return self.info

    async def start(self, spec: VmSpec) -> Vm:
        await self.world.pass_through("vmm.start")
        self.world.starts += 1
        clone = spec.restore_from is not None and not spec.restore_from.parent.name.startswith("tmp-")
        if clone and self.world.clone_faults:
            raise self.world.clone_faults.pop(0)
        return FakeVm(self.world, spec.id)

    async def adopt(self, id: str, run_dir: Path, token: Mapping[str, str]) -> Vm | None:
        return self.world.vms.get(token.get("vm", ""))


class FakeDisks:
    def __init__(self, world: World) -> None:
        self.world = world

    async def make_disk(self, path: Path, size_bytes: int) -> None:
        self.world.reached["disk"].set()
        if "disk" in self.world.faults:
            raise self.world.faults["disk"]
        if "disk" in self.world.hangs:
            await asyncio.sleep(0.01)  # a thread: it ends by itself, whoever is cancelled
        await asyncio.to_thread(path.write_bytes, b"")  # a fake guest does not look at its size


class FakeNetwork:
    """Networks that are names; `updates` has (id, policy, secrets) of each update."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.updates: list[tuple[str, Policy, tuple[SecretSpec, ...]]] = []
        self.update_faults: list[Exception] = []
        self.kernel_states: dict[str, KernelState] = {}
        self.drops: dict[Reason, int] = {}  # of each sandbox, at each look

    async def make(self, sandbox_id: str, policy: Policy, secrets: tuple[SecretSpec, ...]) -> None:
        with step("netns"):
            await self.make_bare(sandbox_id)

    async def make_bare(self, sandbox_id: str) -> None:
        await run_to_completion(self.world.make_namespace(sandbox_id))

    async def adopt(
        self, sandbox_id: str, policy: Policy, secrets: tuple[SecretSpec, ...], state: KernelState, vmm_pid: int
    ) -> None:
        self.world.namespaces.add(sandbox_id)
        self.kernel_states[sandbox_id] = state

    async def update(self, sandbox_id: str, policy: Policy, secrets: tuple[SecretSpec, ...]) -> None:
        if self.update_faults:
            raise self.update_faults.pop(0)
        self.updates.append((sandbox_id, policy, secrets))

    async def remove(self, sandbox_id: str) -> None:
        await self.world.remove_namespace(sandbox_id)

    def kernel_state(self, sandbox_id: str) -> KernelState:
        return self.kernel_states.get(sandbox_id, KernelState())

    async def take_drops(self, sandbox_id: str) -> dict[Reason, int]:
        return dict(self.drops)


class FakeSecrets:
    """A store of secrets in memory, without CAs."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, str]] = {}

    async def store_secrets(
        self, sandbox_id: str, specs: Iterable[SecretSpec], values: Mapping[str, str], *, inspect: bool
    ) -> dict[str, str]:
        before = self.values.get(sandbox_id, {})
        self.values[sandbox_id] = {spec.name: values.get(spec.name) or before[spec.name] for spec in specs}
        return dict(before)

    async def inherit(self, sandbox_id: str, parent_id: str) -> None:
        self.values[sandbox_id] = self.values.get(parent_id, {})

    def fingerprint(self, values: Mapping[str, str]) -> str:
        return repr(sorted(values.items()))

    async def release(self, sandbox_id: str) -> None:
        self.values.pop(sandbox_id, None)

    async def ca_certificate(self, sandbox_id: str) -> str:
        return ""

    async def trust_fields(self, sandbox_id: str, specs: Iterable[SecretSpec]) -> dict[str, object] | None:
        placeholders = {spec.name: spec.placeholder for spec in specs}
        return {"env": placeholders} if placeholders else None


class FakeImages:
    """One image, called minimal."""

    def get_build(self, name: str, digest: str) -> Image:
        return self.get(name)

    def get(self, name: str) -> Image:
        if name != "minimal":
            raise NotFound(f"no image {name}", reason="IMAGE_NOT_FOUND")
        part = Artefact(Path("/image/part"), "0" * 64, 1)
        return Image(
            "minimal", "0" * 64, "0" * 64, "2026-01-01T00:00:00Z", Path("/image"), part, "6.12", part, part, "erofs",
            64 * MIB, (), {},
        )  # fmt: skip

    def list(self) -> list[Image]:
        return [self.get("minimal")]


class SilentObserver:
    """Keeps what a supervisor reports."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, BaseException]] = []
        self.states: list[tuple[str, bool]] = []

    def on_failure(self, loop: str, error: BaseException, retry_in_s: float | None) -> None:
        self.failures.append((loop, error))

    def on_state(self, loop: str, *, failing: bool) -> None:
        self.states.append((loop, failing))


@dataclasses.dataclass
class Bench:
    """A service over a fake host."""

    world: World
    host: HostServices
    sandboxes: SandboxService
    store: Store
    network: FakeNetwork
    secrets: FakeSecrets
    denials: Denials
    supervisor: Supervisor
    events: Events

    def left(self) -> list[str]:
        """What is on the host now: must be empty once all sandboxes are gone."""
        directories = [
            str(path) for root in (self.host.paths.sandboxes_run, self.host.paths.sandboxes_state)
            if root.exists() for path in root.iterdir()
        ]  # fmt: skip
        return [*directories, *self.world.namespaces, *self.world.vms]


def spec(**fields: Any) -> SandboxSpec:
    """A small sandbox."""
    values: dict[str, Any] = {"image": "minimal", "vcpu_count": 1, "memory_bytes": 64 * MIB, "disk_bytes": 16 * MIB}
    return SandboxSpec(**{**values, "lifetime": Lifetime(), **fields})


def record(**fields: Any) -> Record:
    """A record as the store would hold it."""
    values: dict[str, Any] = {
        "id": "sbx-0000000000000000", "spec": spec(), "state": State.RUNNING, "create_time": 1.0,
        "token": {"vm": "sbx-0000000000000000"},
    }  # fmt: skip
    return Record(**{**values, **fields})


def settings(directory: Path, **sandbox: Any) -> Settings:
    """Settings below `directory`."""
    return Settings(
        node=NodeSettings(name="node", max_sandboxes=10, reserved_memory_bytes=0, reserved_disk_bytes=0),
        paths=PathSettings(run_dir=directory / "run", state_dir=directory / "state"),
        sandbox=SandboxSettings(**{"boot_timeout_s": 1.0, "relink_timeout_s": 0.05, **sandbox}),
    )


@asynccontextmanager
async def bench(
    directory: Path, monkeypatch: pytest.MonkeyPatch, *, templates: TemplateSettings | None = None, **sandbox: Any
) -> AsyncIterator[Bench]:
    """Yield a service over an empty fake host; with `templates`, sandboxes are clones."""
    world = World()
    monkeypatch.setattr(guest_setup, "Channel", cast("type[Channel]", FakeChannel))
    chosen = dataclasses.replace(settings(directory, **sandbox), templates=templates or TemplateSettings(enabled=False))
    chosen.paths.state_dir.mkdir(parents=True)
    network, secrets, events = FakeNetwork(world), FakeSecrets(), Events()
    denials = Denials(events.publish_denial)
    host = HostServices(
        chosen,
        Paths.of(chosen),
        FakeDriver(world),
        cast("DiskMaker", FakeDisks(world)),
        RecordNetwork(cast("SandboxNetwork", network), OPERATOR, denials),
        cast("SecretStore", secrets),
        Volumes(chosen.paths.state_dir / "volumes"),
        UidPool(0),
        Cgroups(None),
    )
    store = Store(host.paths.database, host.paths.sandboxes_state)
    await store.open()
    made = Templates(host) if templates is not None else None
    supervisor = Supervisor(SilentObserver())
    node = Node(chosen, VMM, supervisor)
    images = cast("ImageStore", FakeImages())
    sandboxes = SandboxService.build(host, images, node, store, events, supervisor, made)
    ending = supervisor.start("expiry", sandboxes.expiry.run)
    try:
        yield Bench(world, host, sandboxes, store, network, secrets, denials, supervisor, events)
    finally:
        world.remove_faults = 0
        await ending.stop()
        await sandboxes.stop(keep=False)
        await store.aclose()
