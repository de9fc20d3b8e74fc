"""The service over a fake host: whatever goes wrong, and whenever, nothing is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.common.errors import (
    AlreadyExists,
    DeadlineExceeded,
    GuestUnreachable,
    HostError,
    InvalidSpec,
    InvalidState,
    NotFound,
    ResourceExhausted,
    VmmError,
)
from agent.common.model import Lifetime, State
from agent.daemon.sandbox.state.events import EventType
from tests.support.daemon_fakes import MIB, PHASES, Bench, FakeVm, bench, record, spec

ID = "sbx-0000000000000000"


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    async with bench(tmp_path, monkeypatch) as made:
        yield made


async def until(condition: object) -> None:
    """Waits for what must come soon."""
    assert callable(condition)
    async with asyncio.timeout(2):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.001)


async def test_create_makes_a_running_sandbox_and_delete_leaves_nothing(node: Bench) -> None:
    created = await node.sandboxes.create(spec())
    assert created.state is State.RUNNING
    names = [name for name, _ in created.phases]
    assert names == [
        "intent", "directories", "cgroup", "netns", "disk", "vmm.start", "token", "guest.boot", "guest.configure",
        "guest.clock_sync", "create",
    ]  # fmt: skip
    assert created.vmm == "fake 1.0 (tcg)"
    assert len(node.left()) == 4
    await node.sandboxes.delete(created.id)
    assert node.left() == []
    with pytest.raises(NotFound, match="list the sandboxes"):
        node.sandboxes.get(created.id)


async def test_each_guest_gets_its_own_entropy_and_identity(node: Bench) -> None:
    first, second = await node.sandboxes.create(spec()), await node.sandboxes.create(spec())
    (_, one), (_, two) = (channel.calls[0] for channel in node.world.channels)
    assert one["entropy"] != two["entropy"]
    assert one["machine_id"] != two["machine_id"]
    assert (one["hostname"], two["hostname"]) == (first.id, second.id)


@pytest.mark.parametrize("phase", PHASES)
async def test_a_failure_in_any_phase_leaves_nothing(node: Bench, phase: str) -> None:
    node.world.faults[phase] = HostError("no luck") if phase != "dial" else InvalidState("no luck")
    with pytest.raises((HostError, InvalidState), match="no luck"):
        await node.sandboxes.create(spec())
    assert node.left() == []
    assert node.sandboxes.list() == []


@pytest.mark.parametrize("phase", PHASES)
async def test_a_delete_in_any_phase_of_the_create_leaves_nothing(node: Bench, phase: str) -> None:
    node.world.hangs.add(phase)
    creating = asyncio.create_task(node.sandboxes.create(spec()))
    await node.world.reached[phase].wait()
    (found,) = node.sandboxes.list()
    await node.sandboxes.delete(found.id)
    assert node.left() == []
    with pytest.raises(InvalidState, match="was deleted while"):
        await creating


async def test_a_silent_guest_is_a_deadline_with_the_console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(tmp_path, monkeypatch, boot_timeout_s=0.02) as node:
        node.world.hangs.add("dial")
        with pytest.raises(DeadlineExceeded, match=r"did not answer within 0\.02 s") as caught:
            await node.sandboxes.create(spec())
        assert "Kernel panic" in caught.value.message
        assert "\x1b" not in caught.value.message
        assert node.left() == []


async def test_a_vmm_that_dies_during_boot_is_noticed_at_once(node: Bench) -> None:
    node.world.hangs.add("dial")
    creating = asyncio.create_task(node.sandboxes.create(spec()))
    await node.world.reached["dial"].wait()
    start = time.monotonic()
    next(iter(node.world.vms.values())).die()
    with pytest.raises(VmmError, match=r"(?s)killed by signal 9.*Kernel panic"):
        await creating
    assert time.monotonic() - start < 0.5
    assert node.left() == []


async def test_a_caller_that_leaves_does_not_cancel_the_create(node: Bench) -> None:
    node.world.hangs.add("netns")  # slow, not endless
    creating = asyncio.create_task(node.sandboxes.create(spec()))
    await node.world.reached["disk"].wait()
    creating.cancel()
    await until(lambda: [found.state for found in node.sandboxes.list()] == [State.RUNNING])


async def test_deletes_at_once_are_one_delete(node: Bench) -> None:
    created = await node.sandboxes.create(spec())
    events = node.sandboxes.watch(lambda _: True)
    await anext(events)
    await asyncio.gather(*(node.sandboxes.delete(created.id) for _ in range(10)))
    assert node.left() == []
    assert [(await anext(events)).type for _ in range(3)] == [EventType.SYNCED, EventType.UPDATED, EventType.DELETED]
    with pytest.raises(NotFound):
        await node.sandboxes.delete(created.id)


async def test_a_delete_that_failed_is_finished_by_the_next(node: Bench) -> None:
    created = await node.sandboxes.create(spec())
    node.world.remove_faults = 1
    with pytest.raises(HostError, match="busy"):
        await node.sandboxes.delete(created.id)
    assert node.sandboxes.get(created.id).state is State.DELETING
    assert created.id in node.left()
    await node.sandboxes.delete(created.id)
    assert node.left() == []


async def test_one_request_id_makes_one_sandbox(node: Bench) -> None:
    made = await asyncio.gather(*(node.sandboxes.create(spec(request_id="r1")) for _ in range(5)))
    assert len({created.id for created in made}) == 1
    assert node.world.starts == 1
    with pytest.raises(AlreadyExists) as caught:
        await node.sandboxes.create(spec(request_id="r1", memory_bytes=128 * MIB))
    assert caught.value.reason == "REQUEST_ID_REUSED"
    await node.sandboxes.delete(made[0].id)
    assert (await node.sandboxes.create(spec(request_id="r1"))).id != made[0].id


async def test_a_failed_create_frees_its_request_id(node: Bench) -> None:
    node.world.faults["vmm.start"] = VmmError("no luck")
    with pytest.raises(VmmError):
        await node.sandboxes.create(spec(request_id="r1"))
    node.world.faults.clear()
    assert (await node.sandboxes.create(spec(request_id="r1"))).state is State.RUNNING


async def test_a_vm_that_dies_later_leaves_a_failed_sandbox_with_its_console(node: Bench) -> None:
    created = await node.sandboxes.create(spec())
    node.world.vms[created.id].die()
    await until(lambda: node.sandboxes.get(created.id).state is State.FAILED)
    assert "Kernel panic" in node.sandboxes.get(created.id).error
    with pytest.raises(InvalidState, match="killed by signal 9") as caught:
        node.sandboxes.running(created.id)
    assert caught.value.reason == "SANDBOX_NOT_RUNNING"
    await node.sandboxes.delete(created.id)
    assert node.left() == []


async def test_a_lost_link_is_dialled_again(node: Bench) -> None:
    created = await node.sandboxes.create(spec())
    node.world.channels[0].lost.set_result(GuestUnreachable("gone"))
    await until(lambda: len(node.world.channels) == 2)
    await asyncio.sleep(0)
    assert id(node.sandboxes.channel(created.id)) == id(node.world.channels[1])
    assert node.sandboxes.get(created.id).state is State.RUNNING


async def test_a_link_that_stays_lost_fails_the_sandbox(node: Bench) -> None:
    created = await node.sandboxes.create(spec())
    node.world.faults["dial"] = GuestUnreachable("nobody there")
    node.world.channels[0].lost.set_result(GuestUnreachable("gone"))
    await until(lambda: node.sandboxes.get(created.id).state is State.FAILED)
    assert node.world.vms == {}


@pytest.mark.parametrize(
    ("lifetime", "reason"),
    [(Lifetime(duration_s=0.02), "expired"), (Lifetime(lease_s=0.02), "lease lapsed")],
)
async def test_a_sandbox_ends_with_its_time(node: Bench, lifetime: Lifetime, reason: str) -> None:
    events = node.sandboxes.watch(lambda _: True)
    await anext(events)
    await node.sandboxes.create(spec(lifetime=lifetime))
    async with asyncio.timeout(2):
        async for event in events:
            if event.type is EventType.DELETED:
                break
    assert event.reason == reason
    assert node.left() == []


async def test_a_lease_that_is_renewed_does_not_lapse(node: Bench) -> None:
    created = await node.sandboxes.create(spec(lifetime=Lifetime(lease_s=0.06)))
    for _ in range(6):
        await asyncio.sleep(0.02)
        assert await node.sandboxes.renew_lease(created.id) > time.time()
    assert node.sandboxes.get(created.id).state is State.RUNNING
    await until(lambda: not node.sandboxes.list())


async def test_only_a_lease_can_be_renewed_and_only_others_expire(node: Bench) -> None:
    plain = await node.sandboxes.create(spec())
    leased = await node.sandboxes.create(spec(lifetime=Lifetime(lease_s=60)))
    with pytest.raises(InvalidState) as caught:
        await node.sandboxes.renew_lease(plain.id)
    assert caught.value.reason == "NO_LEASE"
    change = {"clear_expire_time": False, "set_labels": {"a": "b"}, "remove_labels": ()}
    with pytest.raises(InvalidState, match="KeepAlive"):
        await node.sandboxes.update(leased.id, expire_time=time.time() + 5, **change)  # type: ignore[arg-type]
    for wrong in (1.0, time.time() - 1, 1e12):
        with pytest.raises(InvalidSpec, match="in the future"):
            await node.sandboxes.update(plain.id, expire_time=wrong, **change)  # type: ignore[arg-type]
    changed = await node.sandboxes.update(plain.id, expire_time=time.time() + 5, **change)  # type: ignore[arg-type]
    assert changed.labels == {"a": "b"}
    assert changed.expire_time is not None


async def test_admission_says_what_lacks(node: Bench) -> None:
    with pytest.raises(ResourceExhausted, match=r"memory_bytes: \d+ wanted, \d+ left") as caught:
        await node.sandboxes.create(spec(memory_bytes=1 << 50))
    assert caught.value.reason == "NODE_FULL"
    for _ in range(10):
        await node.sandboxes.create(spec())
    with pytest.raises(ResourceExhausted, match="sandboxes: 1 wanted, 0 left"):
        await node.sandboxes.create(spec())


async def test_an_image_that_is_missing_or_needs_more_memory_is_refused(node: Bench) -> None:
    with pytest.raises(NotFound, match="no image other"):
        await node.sandboxes.create(spec(image="other"))
    with pytest.raises(InvalidSpec, match="needs at least"):
        await node.sandboxes.create(spec(memory_bytes=MIB))


async def test_a_draining_node_takes_nothing(node: Bench) -> None:
    node.sandboxes.node.set_draining("it is draining")
    with pytest.raises(ResourceExhausted, match="draining"):
        await node.sandboxes.create(spec())


async def test_ids_are_checked(node: Bench) -> None:
    with pytest.raises(InvalidSpec, match="not a sandbox id"):
        node.sandboxes.get("../../etc")
    with pytest.raises(NotFound):
        node.sandboxes.get(ID)


async def test_stop_deletes_or_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(tmp_path, monkeypatch) as node:
        kept = await node.sandboxes.create(spec(request_id="mine", lifetime=Lifetime(lease_s=60)))
        await node.sandboxes.stop(keep=True)
        assert kept.id in node.world.vms
        await node.store.aclose()
    async with bench(tmp_path / "other", monkeypatch) as node:
        await node.sandboxes.create(spec())
        await node.sandboxes.stop(keep=False)
        assert node.left() == []


async def test_recovery_adopts_what_lives_and_removes_the_rest(node: Bench) -> None:
    ids = [f"sbx-{number:016}" for number in range(4)]
    for sandbox_id in ids:
        node.host.paths.sandbox_run(sandbox_id).mkdir(parents=True)
        node.world.namespaces.add(sandbox_id)
    alive, dead, half_made, orphan = ids
    FakeVm(node.world, alive)
    FakeVm(node.world, half_made)
    records = [
        record(id=alive, token={"vm": alive}, state=State.RUNNING, spec=spec(request_id="r1")),
        record(id=dead, token={"vm": dead}, state=State.RUNNING),
        record(id=half_made, token={"vm": half_made}, state=State.CREATING),
    ]
    for known in records:
        await node.store.put(known)
    await node.sandboxes.recovery.run(records)
    states = {found.id: (found.state, found.error) for found in node.sandboxes.list()}
    assert states == {alive: (State.RUNNING, ""), dead: (State.LOST, "its VM ended while no agent ran")}
    await node.sandboxes.delete(dead)
    assert node.left() == [str(node.host.paths.sandbox_run(alive)), alive, alive]
    assert orphan not in node.world.namespaces
    assert (await node.sandboxes.create(spec(request_id="r1"))).id == alive
    await node.sandboxes.delete(alive)
    assert node.left() == []


async def test_recovery_ends_a_vm_whose_guest_is_silent(node: Bench) -> None:
    FakeVm(node.world, ID)
    node.world.hangs.add("dial")
    await node.sandboxes.recovery.run([record(state=State.RUNNING)])
    assert node.left() == []
    assert [found.state for found in node.sandboxes.list()] == [State.LOST]


async def test_a_delete_while_a_failed_create_is_removed_removes_nothing_twice(
    node: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = node.sandboxes.watch(lambda _: True)
    await anext(events)
    removing, go_on = asyncio.Event(), asyncio.Event()
    released: list[str] = []

    async def release(sandbox_id: str) -> None:
        removing.set()
        await go_on.wait()

    monkeypatch.setattr(node.secrets, "release", release)
    monkeypatch.setattr(node.host.uids, "release", released.append)  # a second one would free another sandbox's UID
    node.world.faults["vmm.start"] = VmmError("no luck")
    creating = asyncio.create_task(node.sandboxes.create(spec()))
    await removing.wait()
    (found,) = node.sandboxes.list()
    deleting = asyncio.create_task(node.sandboxes.delete(found.id))
    await asyncio.sleep(0.01)
    go_on.set()
    with pytest.raises(VmmError, match="no luck"):
        await creating
    await deleting
    await asyncio.sleep(0.01)
    assert len(released) == 1
    node.world.faults.clear()
    await node.sandboxes.create(spec())
    seen = [(await anext(events)).type for _ in range(3)]
    assert seen == [EventType.CREATED, EventType.DELETED, EventType.CREATED]
