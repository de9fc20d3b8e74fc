"""Secrets and policies in the life of a sandbox, over a fake host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent.common.errors import AlreadyExists, HostError, InvalidSpec, InvalidState, NotFound
from agent.common.model import NetSpec, SecretSpec
from agent.common.policy.reasons import Denial, Reason
from agent.common.policy.rules import parse_rule
from agent.daemon.sandbox.lifecycle.policy_change import PolicyChange
from agent.daemon.sandbox.state.events import EventType
from agent.daemon.sandbox.state.record import Record
from tests.support.daemon_fakes import Bench, bench, record, spec


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    async with bench(tmp_path, monkeypatch) as made:
        yield made


def secret(name: str = "KEY", placeholder: str = "mark", **fields: Any) -> SecretSpec:
    return SecretSpec(name, (parse_rule("a.example"),), placeholder, **fields)


async def update(node: Bench, sandbox_id: str, change: PolicyChange) -> Record:
    return await node.sandboxes.update(
        sandbox_id, expire_time=None, clear_expire_time=False, set_labels={}, remove_labels=(), policy=change
    )


def trusted(node: Bench) -> list[dict[str, object]]:
    return [fields for channel in node.world.channels for op, fields in channel.calls if op == "sys.trust"]


async def test_a_create_holds_values_and_tells_the_guest_placeholders(node: Bench) -> None:
    made = await node.sandboxes.create(spec(secrets=(secret(),)), {"KEY": "value"})
    assert node.secrets.values == {made.id: {"KEY": "value"}}
    assert [order["env"] for order in trusted(node)] == [{"KEY": "mark"}]
    assert "value" not in made.to_json()
    await node.sandboxes.delete(made.id)
    assert node.secrets.values == {}


async def test_a_failed_create_forgets_values(node: Bench) -> None:
    node.world.faults["vmm.start"] = HostError("no")
    with pytest.raises(HostError):
        await node.sandboxes.create(spec(secrets=(secret(),)), {"KEY": "value"})
    assert node.secrets.values == {}


async def test_a_change_keeps_placeholders_and_tells_only_news(node: Bench) -> None:
    made = await node.sandboxes.create(spec(secrets=(secret(),)), {"KEY": "value"})
    again = await update(node, made.id, PolicyChange(set_secrets={"KEY": (secret(placeholder="new"), "second")}))
    assert [one.placeholder for one in again.secrets] == ["mark"]
    assert node.secrets.values[made.id] == {"KEY": "second"}
    assert len(trusted(node)) == 1  # a new value is none of the guest's affair
    more = PolicyChange(NetSpec(allow=(parse_rule("b.example"),)), {"TWO": (secret("TWO", "two"), "2")}, ("KEY",))
    again = await update(node, made.id, more)
    assert ([one.name for one in again.secrets], again.net.allow) == (["TWO"], (parse_rule("b.example"),))
    assert trusted(node)[-1] == {"env": {"TWO": "two"}, "remove_env": ["KEY"], "timeout_s": 20.0}
    assert node.network.updates[-1][1].allow == (parse_rule("b.example"),)
    assert node.secrets.values[made.id] == {"TWO": "2"}


async def test_a_change_that_fails_changes_nothing(node: Bench) -> None:
    made = await node.sandboxes.create(spec(secrets=(secret(),)), {"KEY": "value"})
    node.network.update_faults = [HostError("no")]
    with pytest.raises(HostError):
        await update(node, made.id, PolicyChange(NetSpec(allow=()), {"KEY": (secret(), "other")}))
    after = node.sandboxes.get(made.id)
    assert (after.net, after.secrets) == (made.net, made.secrets)
    assert node.secrets.values[made.id] == {"KEY": "value"}
    assert node.network.updates[-1][1].allow == made.net.allow


async def test_changes_that_make_no_sense(node: Bench) -> None:
    made = await node.sandboxes.create(spec(env={"TAKEN": "x"}))
    with pytest.raises(NotFound, match="no secret"):
        await update(node, made.id, PolicyChange(remove_secrets=("KEY",)))
    with pytest.raises(InvalidSpec, match="remove one of the two"):
        await update(node, made.id, PolicyChange(set_secrets={"TAKEN": (secret("TAKEN"), "v")}))
    node.world.vms[made.id].die()
    while node.sandboxes.get(made.id).error == "":  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    with pytest.raises(InvalidState):
        await update(node, made.id, PolicyChange(NetSpec(allow=())))


async def test_the_same_request_with_other_values_is_another_request(node: Bench) -> None:
    one = await node.sandboxes.create(spec(request_id="r", secrets=(secret(),)), {"KEY": "value"})
    two = await node.sandboxes.create(spec(request_id="r", secrets=(secret(placeholder="other"),)), {"KEY": "value"})
    assert one.id == two.id
    with pytest.raises(AlreadyExists):
        await node.sandboxes.create(spec(request_id="r", secrets=(secret(),)), {"KEY": "another"})


async def test_denials_are_told_and_do_not_push_out_other_events(node: Bench) -> None:
    made = await node.sandboxes.create(spec())
    watch = node.sandboxes.watch(lambda _: True)
    assert [(await anext(watch)).type for _ in range(2)] == [EventType.SNAPSHOT, EventType.SYNCED]
    for number in range(2000):
        node.events.publish_denial(made, Denial(Reason.HOST_NOT_ALLOWED, f"h{number}", 443, "tls", 1))
    await node.sandboxes.delete(made.id)
    seen = []
    async for event in watch:
        seen.append(event)
        if event.type is EventType.DELETED:
            break
    denied = [event for event in seen if event.type is EventType.DENIED]
    assert 100 < len(denied) < 1000
    assert denied[0].denial is not None
    assert denied[0].denial.host == "h0"
    node.network.drops = {Reason.SPOOFED: 1}
    assert (await node.sandboxes.inspect((await node.sandboxes.create(spec())).id)).denials == {"spoofed": 1}


def test_a_record_of_before_there_were_networks_can_be_read() -> None:
    made = record(net=NetSpec(allow=(parse_rule("a.example"),), tenant="t"), secrets=(secret(in_body=True),), slot=3)
    assert Record.from_json(made.to_json()) == made
    import json

    old = json.loads(made.to_json())
    for name in ("net", "secrets", "slot", "denials", "fingerprint"):
        del old[name]
    for name in ("net", "secrets"):
        del old["spec"][name]
    read = Record.from_json(json.dumps(old))
    assert (read.net, read.secrets, read.slot) == (NetSpec(), (), None)
