"""A change of policy is whole: memory, vault, database and network agree, whatever ends it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agent.common.errors import HostError, InvalidState
from tests.support.daemon_fakes import OPERATOR, Bench, FakeChannel
from tests.support.stored_changes import AFTER, BEFORE, CHANGE, CLOSED, Disk, closed, policies, stored, until, update


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
