"""Changes of a sandbox are whole: a caller that leaves, a full disk and a delete leave memory, vault, database and
network in agreement.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from agent.common.clock import uptime_s
from agent.common.errors import AgentError, HostError, InvalidState, ResourceExhausted
from agent.common.model import Lifetime, NetSpec, SecretSpec, State
from agent.common.policy.rules import parse_rule
from agent.daemon.network.sandbox_network import KernelState
from agent.daemon.sandbox.lifecycle import expiry
from agent.daemon.sandbox.lifecycle.operations import Operations
from agent.daemon.sandbox.lifecycle.policy_change import PolicyChange
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.store import Store
from tests.support.daemon_fakes import (
    OPERATOR,
    Bench,
    FakeChannel,
    FakeVm,
    bench,
    record,
    spec,
)

ID = "sbx-0000000000000000"
CLOSED = NetSpec(allow=())
OPEN = NetSpec(allow=(parse_rule("b.example"),))
OLD = SecretSpec("OLD", (parse_rule("a.example"),), "mark-old")
NEW = SecretSpec("NEW", (parse_rule("a.example"),), "mark-new")
CHANGE = PolicyChange(OPEN, {"NEW": (NEW, "new value")}, ("OLD",))


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    async with bench(tmp_path, monkeypatch) as made:
        yield made


class Disk:
    """Refuses every write of the store while `full`."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self._write = store._write
        monkeypatch.setattr(store, "_write", self.write)

    def write(self, statement: str, *values: str) -> None:
        if self.full:
            raise HostError("the disk is full", reason="STATE_UNAVAILABLE")
        self._write(statement, *values)


@pytest.fixture
def disk(node: Bench, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(node.store, monkeypatch)


async def update(node: Bench, sandbox_id: str, policy: PolicyChange | None = None, **fields: Any) -> Record:
    values: dict[str, Any] = {
        "expire_time": None, "clear_expire_time": False, "set_labels": {}, "remove_labels": (),
        "policy": policy or PolicyChange(),
    }  # fmt: skip
    return await node.sandboxes.update(sandbox_id, **{**values, **fields})


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(3):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.005)


def stored(node: Bench, sandbox_id: str) -> Record:
    """The record in the database."""
    with sqlite3.connect(node.host.paths.database) as db:
        (text,) = db.execute("SELECT record FROM sandboxes WHERE id = ?", (sandbox_id,)).fetchone()
    db.close()
    return Record.from_json(text)


async def closed(node: Bench, **fields: Any) -> Record:
    return await node.sandboxes.create(spec(net=CLOSED, secrets=(OLD,), **fields), {"OLD": "old value"})


def policies(node: Bench, sandbox_id: str) -> dict[str, object]:
    """The policy in each place that holds it; the network's is the one that it was given last."""
    now, kept, network = node.sandboxes.get(sandbox_id), stored(node, sandbox_id), node.network.updates[-1][1:]
    return {
        "memory": (now.net, now.secrets), "database": (kept.net, kept.secrets),
        "network": network, "vault": node.secrets.values[sandbox_id],
    }  # fmt: skip


def everywhere(net: NetSpec, secret: SecretSpec, value: str) -> dict[str, object]:
    policy, effective = (net, (secret,)), OPERATOR.effective(net)
    return {
        "memory": policy, "database": policy, "network": (effective, (secret,)), "vault": {secret.name: value},
    }  # fmt: skip


BEFORE, AFTER = everywhere(CLOSED, OLD, "old value"), everywhere(OPEN, NEW, "new value")


# -- changes of policy -------------------------------------------------------------------------------------------------


@pytest.fixture
def blocked(node: Bench, monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """The first update of the network sets one event and waits for the other before it is done."""
    reached, go_on, real = asyncio.Event(), asyncio.Event(), node.network.update

    async def slow(*given: Any) -> None:
        first = not reached.is_set()
        reached.set()
        await real(*given)
        if first:
            await go_on.wait()

    monkeypatch.setattr(node.network, "update", slow)
    return reached, go_on


async def test_a_caller_that_leaves_does_not_stop_an_update(
    node: Bench, blocked: tuple[asyncio.Event, asyncio.Event]
) -> None:
    made = await closed(node)
    reached, go_on = blocked
    calling = asyncio.create_task(update(node, made.id, CHANGE, set_labels={"a": "b"}))
    await reached.wait()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    go_on.set()
    await until(lambda: node.sandboxes.get(made.id).labels == {"a": "b"})
    await until(lambda: policies(node, made.id) == AFTER)
    assert stored(node, made.id).labels == {"a": "b"}


@pytest.mark.parametrize("fault", [HostError("no"), RuntimeError("can't start new thread"), KeyError("no")])
async def test_an_update_that_fails_in_any_way_is_undone(node: Bench, fault: Exception) -> None:
    made = await closed(node)
    node.network.update_faults = [fault]
    with pytest.raises(type(fault)):
        await update(node, made.id, CHANGE, set_labels={"a": "b"})
    assert policies(node, made.id) == BEFORE
    assert (node.sandboxes.get(made.id).labels, stored(node, made.id).labels) == ({}, {})
    await update(node, made.id, CHANGE)
    assert policies(node, made.id) == AFTER


async def test_a_full_disk_undoes_an_update_and_tells_the_guest(node: Bench, disk: Disk) -> None:
    made = await closed(node)
    disk.full = True
    with pytest.raises(HostError, match="disk is full"):
        await update(node, made.id, CHANGE, set_labels={"a": "b"})
    assert policies(node, made.id) == BEFORE
    assert node.sandboxes.get(made.id).labels == {}
    orders = [fields for op, fields in node.world.channels[-1].calls if op == "sys.trust"]
    assert [(order["env"], order["remove_env"]) for order in orders[1:]] == [
        ({"NEW": "mark-new"}, ["OLD"]), ({"OLD": "mark-old"}, ["NEW"]),
    ]  # fmt: skip


async def test_one_step_that_cannot_be_undone_keeps_no_other_from_it(
    node: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await closed(node)
    real, calls = node.secrets.store_secrets, [0]

    async def store_secrets(*args: Any, inspect: bool) -> dict[str, str]:
        calls[0] += 1
        if calls[0] > 1:
            raise HostError("no space left")
        return await real(*args, inspect=inspect)

    monkeypatch.setattr(node.secrets, "store_secrets", store_secrets)
    node.network.update_faults = [HostError("the first error")]
    with pytest.raises(HostError, match="the first error"):
        await update(node, made.id, CHANGE)
    assert {**policies(node, made.id), "vault": None} == {**BEFORE, "vault": None}


async def test_a_delete_undoes_an_update_before_it_goes_on(node: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await closed(node)
    asked, real = asyncio.Event(), FakeChannel.call

    async def silent(channel: FakeChannel, op: str, /, **fields: object) -> dict[str, Any]:
        if op == "sys.trust":
            asked.set()
            await asyncio.Event().wait()
        return await real(channel, op, **fields)

    monkeypatch.setattr(FakeChannel, "call", silent)
    updating = asyncio.create_task(update(node, made.id, CHANGE))
    await asyncio.wait_for(asked.wait(), 2)
    node.world.remove_faults = 1
    with pytest.raises(HostError, match="busy"):
        await node.sandboxes.delete(made.id)  # it fails, so that there is something to look at
    with pytest.raises(InvalidState) as caught:
        await asyncio.wait_for(updating, 2)
    assert caught.value.reason == "SANDBOX_DELETED"
    assert policies(node, made.id) == BEFORE
    await node.sandboxes.delete(made.id)
    assert node.left() == []


async def test_the_values_that_a_record_needs_are_there_until_another_one_is_stored(
    node: Bench, blocked: tuple[asyncio.Event, asyncio.Event]
) -> None:
    made = await closed(node)
    reached, go_on = blocked
    updating = asyncio.create_task(update(node, made.id, CHANGE))
    await reached.wait()  # an agent that is killed now leaves this to the next one
    assert [secret.name for secret in stored(node, made.id).secrets] == ["OLD"]
    assert node.secrets.values[made.id] == {"OLD": "old value", "NEW": "new value"}
    go_on.set()
    await updating
    assert node.secrets.values[made.id] == {"NEW": "new value"}


async def test_an_agent_that_stops_undoes_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: Bench, blocked: tuple[asyncio.Event, asyncio.Event]
) -> None:
    made = await closed(node)
    updating = asyncio.create_task(update(node, made.id, CHANGE))
    await blocked[0].wait()
    await node.sandboxes.stop(keep=True)
    with pytest.raises(InvalidState):
        await asyncio.wait_for(updating, 2)
    assert (stored(node, made.id).net, node.network.updates[-1][1]) == (CLOSED, OPERATOR.effective(CLOSED))
    assert node.secrets.values[made.id] == {"OLD": "old value"}


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


# -- operations --------------------------------------------------------------------------------------------------------


def tasks_of(sandbox_id: str) -> list[str]:
    return [name for task in asyncio.all_tasks() if (name := task.get_name()).endswith(sandbox_id)]


async def test_operations_run_one_at_a_time_and_end_with_a_delete() -> None:
    operations, seen = Operations(ID), []
    started = asyncio.Event()

    async def endless() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            seen.append("undone")

    async def never() -> None:
        seen.append("ran")

    calls = [asyncio.create_task(operations.run("test", work)) for work in (endless, never)]
    await started.wait()
    await operations.start_delete(operations.cancel)
    assert seen == ["undone"]
    for call in calls:
        with pytest.raises(InvalidState, match="was deleted while its test was in progress"):
            await call
    with pytest.raises(InvalidState, match="is being deleted"):
        await operations.run("test", never)
    assert (seen, tasks_of(ID)) == (["undone"], [])


async def test_a_failure_after_the_caller_has_left_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    operations, go_on = Operations(ID), asyncio.Event()

    async def fail() -> None:
        await go_on.wait()
        raise HostError("no luck")

    call = asyncio.create_task(operations.run("test", fail))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.wait({call})
    go_on.set()
    await until(lambda: not tasks_of(ID))
    await asyncio.sleep(0)
    assert "no luck" in "".join(capsys.readouterr())
