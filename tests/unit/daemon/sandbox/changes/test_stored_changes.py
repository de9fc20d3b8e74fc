"""A change counts once it is stored: callers that leave and full disks leave memory and database in agreement."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from agent.common.clock import uptime_s
from agent.common.errors import AgentError, HostError, InvalidState, ResourceExhausted
from agent.common.model import Lifetime, State
from agent.daemon.network.sandbox_network import KernelState
from agent.daemon.sandbox.lifecycle import expiry
from agent.daemon.sandbox.state.record import Record
from tests.support.daemon_fakes import Bench, FakeVm, record, spec
from tests.support.stored_changes import CHANGE, Disk, stored, until, update

# -- labels, leases, states --------------------------------------------------------------------------------------------


async def test_a_full_disk_changes_no_label_lease_or_time(node: Bench, disk: Disk) -> None:
    leased = await node.sandboxes.create(spec(lifetime=Lifetime(lease_s=60), labels={"a": "b"}))
    plain = await node.sandboxes.create(spec())
    disk.full = True
    for change in (
        update(node, leased.id, set_labels={"a": "c", "d": "e"}),
        update(node, leased.id, end_lease=True, expire_time=time.time() + 60, remove_labels=["a"]),
        update(node, plain.id, expire_time=time.time() + 60),
        node.sandboxes.renew_lease(leased.id),
        node.sandboxes.pause(plain.id, to_disk=False),
        node.sandboxes.pause(leased.id, to_disk=True),
    ):
        with pytest.raises(HostError, match="disk is full"):
            await cast("Any", change)
    assert [dataclasses.replace(node.sandboxes.get(one.id), maybe_paused=False) for one in (leased, plain)] == [
        leased,
        plain,
    ]
    disk.full = False
    assert await node.sandboxes.renew_lease(leased.id) > (leased.expire_time or 0)
    assert stored(node, leased.id) == node.sandboxes.get(leased.id)


async def test_updates_at_once_are_all_kept(node: Bench) -> None:
    made = await node.sandboxes.create(spec())
    await asyncio.gather(*(update(node, made.id, set_labels={f"l{number}": ""}) for number in range(10)))
    assert sorted(stored(node, made.id).labels) == sorted(f"l{number}" for number in range(10))
    assert node.sandboxes.get(made.id).labels == stored(node, made.id).labels


async def test_a_lease_is_renewed_and_labels_change_while_a_pause_takes_long(node: Bench) -> None:
    made = await node.sandboxes.create(spec(lifetime=Lifetime(lease_s=60)))
    node.world.hangs.add("save")
    pausing = asyncio.create_task(node.sandboxes.pause(made.id, to_disk=True))
    await node.world.reached["save"].wait()
    renewed = await asyncio.wait_for(node.sandboxes.renew_lease(made.id), 1)
    await asyncio.wait_for(update(node, made.id, set_labels={"a": "b"}), 1)
    changing = asyncio.create_task(update(node, made.id, CHANGE))
    await asyncio.sleep(0.05)
    assert not changing.done()
    node.world.hangs.clear()
    after = await pausing
    assert (after.state, after.expire_time, after.labels) == (State.SUSPENDED, renewed, {"a": "b"})
    with pytest.raises(AgentError):  # nothing to remove, and it does not run any more
        await changing
    assert stored(node, made.id) == node.sandboxes.get(made.id)


async def test_a_resume_that_fails_leaves_the_record_as_it_is_stored(node: Bench, disk: Disk) -> None:
    made = await node.sandboxes.create(spec())
    await node.sandboxes.pause(made.id, to_disk=True)
    disk.full = True
    with pytest.raises(HostError, match="disk is full"):
        await node.sandboxes.resume(made.id)
    assert stored(node, made.id) == node.sandboxes.get(made.id)
    assert node.world.vms == {}
    disk.full = False
    assert (await node.sandboxes.resume(made.id)).state is State.RUNNING


async def test_a_state_that_is_stored_when_its_work_is_cancelled_keeps_what_it_needs(
    node: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await node.sandboxes.create(spec())
    real = node.store.change

    async def change(changing: Record, edit: Callable[[Record], None], *, durable: bool = False) -> None:
        await real(changing, edit, durable=durable)
        if durable:
            raise asyncio.CancelledError  # as when an agent stops during the write

    monkeypatch.setattr(node.store, "change", change)
    with pytest.raises(InvalidState):
        await node.sandboxes.pause(made.id, to_disk=True)
    assert stored(node, made.id).state is State.SUSPENDED
    assert (node.host.paths.memory(made.id) / "state").exists()
    machine = node.sandboxes.registry.entry(made.id).machine
    assert machine is not None
    await machine.release()  # as the next agent removes it
    with pytest.raises(InvalidState):
        await node.sandboxes.resume(made.id)
    assert (stored(node, made.id).state, stored(node, made.id).maybe_paused) == (State.RUNNING, True)
    assert made.id in node.world.vms


async def test_a_fork_without_enough_users_leaves_no_copy(node: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await node.sandboxes.create(spec())
    left: list[int | None] = [None, None]

    def take() -> int | None:
        if not left:
            raise ResourceExhausted("no user is left", reason="NO_UID")
        return left.pop()

    monkeypatch.setattr(node.host.uids, "reserve", take)
    with pytest.raises(ResourceExhausted, match="no user is left"):
        await node.sandboxes.fork(made.id, 3, labels={}, lifetime=None, request_id="")
    await until(lambda: [found.id for found in node.sandboxes.list()] == [made.id])


# -- the node ----------------------------------------------------------------------------------------------------------


async def test_a_full_disk_begins_and_ends_no_drain(node: Bench, disk: Disk) -> None:
    made = await node.sandboxes.create(spec())
    disk.full = True
    with pytest.raises(HostError, match="disk is full"):
        await node.sandboxes.drain.begin(0.0)
    assert node.sandboxes.node.draining == ""
    await asyncio.sleep(0.05)
    assert node.sandboxes.get(made.id).state is State.RUNNING  # nothing was evicted
    disk.full = False
    await node.sandboxes.drain.begin(3600)
    disk.full = True
    with pytest.raises(HostError, match="disk is full"):
        await node.sandboxes.drain.end()
    assert node.sandboxes.node.draining == "it is drained"
    disk.full = False


async def test_a_caller_that_leaves_stops_no_drain_half_way(node: Bench) -> None:
    for change in (node.sandboxes.drain.begin(3600), node.sandboxes.drain.end()):
        calling = asyncio.create_task(change)
        await asyncio.sleep(0)
        calling.cancel()
        await asyncio.wait({calling})
        assert bool(node.store.facts.get("drain")) is bool(node.sandboxes.node.draining)


async def test_a_caller_that_leaves_does_not_hide_a_volume(node: Bench) -> None:
    (node.host.paths.database.parent / "volumes").mkdir(exist_ok=True)
    making = asyncio.create_task(node.sandboxes.volumes.create("t", "data", 16 << 20))
    await asyncio.sleep(0)
    making.cancel()
    await asyncio.wait({making})
    on_disk = [path.name for path in (node.host.paths.database.parent / "volumes").iterdir()]
    assert [volume.id for volume in node.sandboxes.volumes.list("t", "vol-", "")] == on_disk


async def test_a_full_disk_does_not_hide_what_is_lost(node: Bench, disk: Disk) -> None:
    disk.full = True
    await node.sandboxes.recovery.run([record(state=State.RUNNING)])
    assert [found.state for found in node.sandboxes.list()] == [State.LOST]


async def test_the_end_of_a_suspended_sandbox_is_stored_for_this_boot(node: Bench) -> None:
    kept = record(state=State.SUSPENDED, token={})
    expiry.live_for(kept, 100)
    kept.expire_uptime = (kept.expire_uptime or 0) + 1e6  # of another boot, whose clock had run longer
    node.host.paths.memory(kept.id).mkdir(parents=True)
    await node.store.put(kept)
    node.store.rebooted = True
    await node.sandboxes.recovery.run([kept])
    assert (stored(node, kept.id).expire_uptime or 0) - uptime_s() <= 100


async def test_what_an_adoption_changes_is_stored(node: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = record()
    FakeVm(node.world, kept.id)
    await node.store.put(kept)

    async def adopt(sandbox_id: str, *_: object) -> None:
        node.network.kernel_states[sandbox_id] = KernelState(7, "other settings")

    monkeypatch.setattr(node.network, "adopt", adopt)
    await node.sandboxes.recovery.run([kept])
    assert (stored(node, kept.id).slot, stored(node, kept.id).rules) == (7, "other settings")


# -- the store ---------------------------------------------------------------------------------------------------------


async def test_a_change_is_seen_once_it_is_stored(node: Bench) -> None:
    kept = record()
    await node.store.put(kept)
    changing = asyncio.create_task(node.store.change(kept, lambda draft: draft.labels.update(a="b")))
    await asyncio.sleep(0)
    assert kept.labels == {}
    kept.denials["spoofed"] = 1  # counted meanwhile
    await changing
    assert (kept.labels, kept.denials) == ({"a": "b"}, {"spoofed": 1})


async def test_a_change_whose_caller_leaves_is_in_memory_if_it_is_stored(node: Bench) -> None:
    kept = record()
    await node.store.put(kept)
    changing = asyncio.create_task(node.store.change(kept, lambda draft: draft.labels.update(a="b")))
    await asyncio.sleep(0)
    changing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await changing
    assert stored(node, kept.id).labels == kept.labels


async def test_a_write_that_waits_does_not_bring_a_deleted_record_back(node: Bench) -> None:
    kept = record()
    writes = [asyncio.create_task(node.store.put(kept)) for _ in range(3)]
    await asyncio.sleep(0)
    await node.store.delete(kept.id)
    await asyncio.gather(*writes)
    with sqlite3.connect(node.host.paths.database) as db:
        assert db.execute("SELECT count(*) FROM sandboxes").fetchone() == (0,)
    db.close()
