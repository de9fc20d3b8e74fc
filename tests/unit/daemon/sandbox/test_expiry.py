"""When sandboxes end: to the second, whatever is done to the host's clock; drains, and sandboxes that stand still."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent.common.background import QUICK, Backoff, Supervisor
from agent.common.clock import uptime_s
from agent.common.errors import AgentError, HostError, InvalidState, NodeDraining, VmmError
from agent.common.model import Lifetime, State
from agent.common.policy.reasons import Reason
from agent.daemon.network import drop_counters
from agent.daemon.sandbox.capacity.drain import Drain, Progress
from agent.daemon.sandbox.lifecycle import expiry
from agent.daemon.sandbox.lifecycle.delete import Deleter
from agent.daemon.sandbox.lifecycle.expiry import Expiry
from agent.daemon.sandbox.lifecycle.registry import SandboxEntry, SandboxRegistry
from agent.daemon.sandbox.state.events import Events, EventType
from agent.daemon.sandbox.state.store import Store
from tests.support.daemon_fakes import Bench, SilentObserver, bench, record, spec


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    async with bench(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock that tells the time of day."""
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])

    def by(seconds: float) -> None:
        offset[0] += seconds

    return by


async def until(condition: Callable[[], object], timeout_s: float = 3) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.01)


# -- clocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [-7200.0, 7200.0])
async def test_a_clock_that_is_set_changes_no_duration(
    node: Bench, jump: Callable[[float], None], seconds: float
) -> None:
    begun = time.monotonic()
    short = await node.sandboxes.create(spec(lifetime=Lifetime(duration_s=1.5)))
    lasting = await node.sandboxes.create(spec(lifetime=Lifetime(duration_s=3600)))
    was = node.sandboxes.get(lasting.id).expire_time
    assert was is not None
    jump(seconds)
    await until(lambda: abs((node.sandboxes.get(lasting.id).expire_time or 0) - was - seconds) < 0.1, 1)
    assert short.id in [found.id for found in node.sandboxes.list()]
    await until(lambda: [found.id for found in node.sandboxes.list()] == [lasting.id])
    assert 1.5 <= time.monotonic() - begun < 2.5


async def test_a_lease_begins_when_it_can_be_renewed(node: Bench) -> None:
    node.world.hangs.add("configure")
    making = asyncio.create_task(node.sandboxes.create(spec(lifetime=Lifetime(lease_s=0.3))))
    await until(node.sandboxes.list)
    await asyncio.sleep(0.9)  # longer than the lease, and than a look at what is over
    assert not making.done()
    node.world.hangs.clear()
    made = await making
    assert made.state is State.RUNNING
    await until(lambda: not node.sandboxes.list())


async def test_a_time_of_day_is_what_the_clock_says(node: Bench, jump: Callable[[float], None]) -> None:
    made = await node.sandboxes.create(spec())
    await node.sandboxes.update(
        made.id, expire_time=time.time() + 3600, clear_expire_time=False, set_labels={}, remove_labels=()
    )
    await asyncio.sleep(0.6)
    assert node.sandboxes.list() != []
    jump(3601)
    await until(lambda: not node.sandboxes.list(), 1.5)


async def test_an_end_is_kept_over_restarts_and_boots(jump: Callable[[float], None]) -> None:
    kept = record()
    expiry.live_for(kept, 100)
    assert kept.expire_uptime is not None
    left = kept.expire_uptime - uptime_s()
    assert 99 < left <= 100
    kept.expire_uptime += 1e6  # of another boot, whose clock had run longer
    jump(40)  # which the reboot took
    expiry.after_reboot(kept)
    assert 59 < kept.expire_uptime - uptime_s() <= 60


async def test_who_is_not_used_ends(node: Bench) -> None:
    events = node.sandboxes.watch(lambda _: True)
    await anext(events)
    made = await node.sandboxes.create(spec(lifetime=Lifetime(idle_s=1.0)))
    channel = node.world.channels[-1]
    channel.idle = 0.0
    await asyncio.sleep(0.6)
    assert node.sandboxes.get(made.id).state is State.RUNNING
    channel.idle = 1.5
    async with asyncio.timeout(2):
        async for event in events:
            if event.type is EventType.DELETED:
                break
    assert event.reason == "idle"


async def test_an_entry_that_cannot_be_ended_keeps_no_other_alive() -> None:
    faults = [RuntimeError("no luck")]
    entries = [SandboxEntry(record(id=f"sbx-000000000000000{number}", expire_time=1.0), None) for number in range(3)]
    ended: list[str] = []

    def end(entry: SandboxEntry, reason: str) -> None:
        if entry is entries[0] and faults:
            raise faults[0]
        ended.append(entry.record.id)

    registry = SandboxRegistry(Events())
    for entry in entries:
        registry.add(entry)
    async with Supervisor(SilentObserver()) as supervisor:
        looking = Expiry(cast("Store", None), registry, cast("Deleter", SimpleNamespace(start=end)))
        supervisor.start("x", looking.run, QUICK)
        await until(lambda: "x" in supervisor.failing)
        assert ended[:2] == [entry.record.id for entry in entries[1:]]
        faults.clear()
        await until(lambda: entries[0].record.id in ended)


async def test_a_clock_set_while_nothing_looked_is_followed(node: Bench, jump: Callable[[float], None]) -> None:
    made = await node.sandboxes.create(spec(lifetime=Lifetime(duration_s=3600)))
    was = made.expire_time
    assert was is not None
    jump(500)
    async with Supervisor(SilentObserver()) as supervisor:
        supervisor.start("another expiry", node.sandboxes.expiry.run, QUICK)
        await until(lambda: abs((node.sandboxes.get(made.id).expire_time or 0) - was - 500) < 0.1)


@pytest.mark.parametrize("fault", [RuntimeError("can't start new thread"), HostError("no luck")])
async def test_drops_are_counted_of_others_and_again_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    monkeypatch.setattr(drop_counters, "_COUNT_EVERY_S", 0.001)
    counted = {"one": 0, "two": 0}
    faults = [fault]

    class Network:
        async def take_drops(self, sandbox_id: str) -> dict[Reason, int]:
            if faults:
                raise faults.pop()
            return {Reason.SPOOFED: 1}

    def add(sandbox_id: str, drops: Mapping[Reason, int]) -> None:
        counted[sandbox_id] += sum(drops.values())

    async with Supervisor(SilentObserver()) as supervisor:
        supervisor.start(
            "x", lambda: drop_counters.keep_counting(cast(Any, Network()), lambda: counted, add), Backoff(0.001)
        )
        await until(lambda: min(counted.values()) >= 3)


# -- drains ------------------------------------------------------------------------------------------------------------


async def test_a_drain_ends_with_the_last_sandbox_and_can_be_undone(node: Bench) -> None:
    made = await node.sandboxes.create(spec())
    seen: list[int] = []
    changes: list[str] = []
    node.sandboxes.node.on_change.add(lambda: changes.append(node.sandboxes.node.draining))
    await node.sandboxes.drain.begin(None)

    async def watch() -> None:
        seen.extend([progress.remaining async for progress in node.sandboxes.drain.progress()])

    watching = asyncio.create_task(watch())
    with pytest.raises(NodeDraining, match="it is drained"):
        await node.sandboxes.create(spec())
    await asyncio.sleep(0.3)
    await node.sandboxes.delete(made.id)
    await asyncio.wait_for(watching, 2)
    assert seen == [1, 0]
    await node.sandboxes.drain.end()
    assert changes == ["it is drained", ""]
    await node.sandboxes.create(spec())


async def test_what_is_left_at_the_deadline_is_evicted(node: Bench) -> None:
    for _ in range(3):
        await node.sandboxes.create(spec())
    await node.sandboxes.drain.begin(3600)
    assert [progress.evict_in_s is not None async for progress in _first(node.sandboxes.drain)] == [True]
    node.world.remove_faults = 1  # one cannot be removed at first
    await node.sandboxes.drain.begin(0.1)
    await until(lambda: not node.sandboxes.list())
    assert node.left() == []


async def test_an_eviction_goes_on_after_an_unexpected_error(node: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await node.sandboxes.create(spec())
    real, faults = node.sandboxes.deleter.start, [RuntimeError("no luck")]

    def start(entry: SandboxEntry, reason: str) -> object:
        if faults:
            raise faults.pop()
        return real(entry, reason)

    monkeypatch.setattr(node.sandboxes.deleter, "start", start)
    await node.sandboxes.drain.begin(0.1)
    await until(lambda: not node.sandboxes.list())
    assert faults == []


async def test_a_drain_that_is_ended_or_prolonged_evicts_nobody(node: Bench) -> None:
    await node.sandboxes.create(spec())
    await node.sandboxes.drain.begin(0.5)
    await node.sandboxes.drain.begin(3600)
    await asyncio.sleep(0.8)
    await node.sandboxes.drain.begin(0.3)
    await node.sandboxes.drain.end()
    await asyncio.sleep(0.8)
    assert len(node.sandboxes.list()) == 1


async def _first(drain: Drain) -> AsyncIterator[Progress]:
    async for progress in drain.progress():
        yield progress
        return


async def test_a_drain_outlives_the_agent(node: Bench) -> None:
    await node.sandboxes.drain.begin(3600)
    async with Supervisor(SilentObserver()) as supervisor:
        another = Drain(node.sandboxes.node, node.store, lambda: 0, lambda: asyncio.sleep(0), supervisor)
        node.sandboxes.node.set_draining("")
        another.restore()
        assert node.sandboxes.node.draining == "it is drained"
        await another.end()
        another.restore()
        assert node.sandboxes.node.draining == ""


# -- standing still ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_disk", [False, True])
async def test_what_stands_still_holds_what_it_says(node: Bench, to_disk: bool) -> None:
    made = await node.sandboxes.create(spec())
    await node.sandboxes.pause(made.id, to_disk=to_disk)
    assert (node.sandboxes.describe_node().memory.allocated == 0) is to_disk
    assert (node.world.vms == {}) is to_disk
    await node.sandboxes.resume(made.id)
    assert node.sandboxes.get(made.id).state is State.RUNNING
    assert next(op for op, _ in node.world.channels[-1].calls) == "sys.refresh"
    assert not node.host.paths.memory(made.id).exists()
    await node.sandboxes.delete(made.id)
    assert node.left() == []


@pytest.mark.parametrize("fault", [VmmError("no luck"), OSError(28, "No space left on device")])
async def test_a_save_that_fails_leaves_the_sandbox_as_it_was(node: Bench, fault: Exception) -> None:
    made = await node.sandboxes.create(spec())
    node.world.faults["save"] = fault
    with pytest.raises(AgentError, match=r"no luck|no space left"):
        await node.sandboxes.pause(made.id, to_disk=True)
    assert node.sandboxes.get(made.id).state is State.RUNNING
    assert node.world.vms[made.id].running
    node.sandboxes.channel(made.id)
    assert [path.name for path in node.host.paths.sandbox_state(made.id).iterdir() if path.is_dir()] == []
    with pytest.raises(AgentError, match=r"no luck|no space left"):
        await node.sandboxes.fork(made.id, 2, labels={}, lifetime=None, request_id="")
    await until(lambda: len(node.sandboxes.list()) == 1)
    del node.world.faults["save"]
    await node.sandboxes.pause(made.id, to_disk=True)
    await node.sandboxes.delete(made.id)
    assert node.left() == []


async def test_a_resume_that_fails_leaves_it_on_the_disk(node: Bench) -> None:
    made = await node.sandboxes.create(spec())
    await node.sandboxes.pause(made.id, to_disk=True)
    for phase in ("netns", "vmm.start"):
        node.world.faults[phase] = HostError("no luck")
        with pytest.raises(HostError, match="no luck"):
            await node.sandboxes.resume(made.id)
        del node.world.faults[phase]
        assert node.sandboxes.get(made.id).state is State.SUSPENDED
        assert node.world.vms == {}
        assert node.world.namespaces == set()
    await node.sandboxes.resume(made.id)


async def test_a_vm_that_ends_while_it_stands_has_failed(node: Bench) -> None:
    made = await node.sandboxes.create(spec())
    await node.sandboxes.pause(made.id, to_disk=False)
    node.world.vms[made.id].die()
    await until(lambda: node.sandboxes.get(made.id).state is State.FAILED)
    with pytest.raises(InvalidState):
        await node.sandboxes.resume(made.id)


async def test_a_delete_ends_whatever_is_under_way(node: Bench) -> None:
    for work in ("pause", "fork"):
        made = await node.sandboxes.create(spec())
        node.world.hangs.add("save")
        if work == "pause":
            working: asyncio.Task[Any] = asyncio.create_task(node.sandboxes.pause(made.id, to_disk=True))
        else:
            working = asyncio.create_task(node.sandboxes.fork(made.id, 2, labels={}, lifetime=None, request_id=""))
        await asyncio.wait_for(node.world.reached["save"].wait(), 2)
        node.world.reached["save"].clear()
        await node.sandboxes.delete(made.id)
        with pytest.raises(InvalidState):
            await working
        node.world.hangs.clear()
        await until(lambda: not node.sandboxes.list())
        assert node.left() == []


async def test_a_starting_agent_finds_what_stood_still(node: Bench) -> None:
    made = [await node.sandboxes.create(spec()) for _ in range(3)]
    await node.sandboxes.pause(made[0].id, to_disk=False)
    for one in made[1:]:
        await node.sandboxes.pause(one.id, to_disk=True)
    (node.host.paths.memory(made[2].id) / "state").unlink()
    node.host.paths.memory(made[2].id).rmdir()
    records = node.sandboxes.list()
    for entry in node.sandboxes.registry.entries():
        await entry.operations.stop_monitor()
    node.sandboxes.registry.clear()
    await node.sandboxes.recovery.run(records)
    found = {one.id: one.state for one in node.sandboxes.list()}
    assert found == dict(zip([one.id for one in made], [State.PAUSED, State.SUSPENDED, State.LOST], strict=True))
    for one in made[:2]:
        await node.sandboxes.resume(one.id)
    for one in made:
        await node.sandboxes.delete(one.id)
    assert node.left() == []
