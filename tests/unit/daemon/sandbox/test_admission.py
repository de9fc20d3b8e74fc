"""Who is let in, who waits, and who is refused, with what lacks."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from agent.common.config.quota import Quota
from agent.common.errors import NodeDraining, ResourceExhausted
from agent.common.model import NetSpec, SandboxSpec
from agent.common.telemetry import REFUSED
from agent.daemon.sandbox.capacity import admission
from tests.support.daemon_fakes import MIB, Bench, bench, spec


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    async with bench(tmp_path, monkeypatch) as made:
        yield made


def of(tenant: str, **fields: object) -> SandboxSpec:
    return spec(net=NetSpec(tenant=tenant), **fields)


@pytest.fixture
def rules(node: Bench) -> Callable[..., None]:
    """Sets the node's rules anew."""

    def change(**values: object) -> None:
        settings = dataclasses.replace(node.host.settings.node, **values)  # type: ignore[arg-type]
        node.sandboxes.admission.reconfigure(settings)

    return change


def test_quotas_are_read() -> None:
    assert Quota.parse("") == Quota()
    assert Quota.parse(" sandboxes=2 , cpus = 3,memory=1GiB") == Quota(2, 3, 1 << 30)
    for wrong in ("sandboxes", "sandboxes=", "sandboxes=x", "disk=1", "memory=lots"):
        with pytest.raises(ValueError, match="is not a limit"):
            Quota.parse(wrong)


async def test_a_deleted_sandbox_wakes_the_first_in_the_queue(
    node: Bench, rules: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "_RECHECK_S", 3600.0)
    rules(max_sandboxes=10, queue_length=1, queue_timeout_s=3600.0)
    made = [await node.sandboxes.create(spec()) for _ in range(10)]
    waiting = asyncio.create_task(node.sandboxes.create(spec()))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await node.sandboxes.delete(made[0].id)
    try:
        await asyncio.wait_for(waiting, 10)
    finally:
        waiting.cancel()


async def test_a_tenant_has_its_quota_and_no_more(node: Bench, rules: Callable[..., None]) -> None:
    rules(quotas={"acme": "sandboxes=2", "*": "memory=128MiB"}, queue_length=10)
    before = REFUSED.labels("TENANT_QUOTA")._value.get()
    first = await node.sandboxes.create(of("acme"))
    await node.sandboxes.create(of("acme"))
    with pytest.raises(ResourceExhausted, match=r"tenant 'acme' would exceed its quota .sandboxes: 3 of 2") as caught:
        await node.sandboxes.create(of("acme"))  # at once, although there is a queue
    assert caught.value.reason == "TENANT_QUOTA"
    assert REFUSED.labels("TENANT_QUOTA")._value.get() == before + 1
    await node.sandboxes.create(of("other", memory_bytes=128 * MIB))
    with pytest.raises(ResourceExhausted, match="memory_bytes: 201326592 of 134217728"):
        await node.sandboxes.create(of("other"))
    with pytest.raises(ResourceExhausted, match="sandboxes: 4 of 2"):
        await node.sandboxes.fork(first.id, 2, labels={}, lifetime=None, request_id="")
    await node.sandboxes.delete(first.id)
    await node.sandboxes.create(of("acme"))


async def test_a_burst_waits_in_order(node: Bench, rules: Callable[..., None]) -> None:
    rules(max_sandboxes=10, queue_length=3, queue_timeout_s=5.0)
    made = [await node.sandboxes.create(spec()) for _ in range(10)]
    ended: list[int] = []

    async def create(number: int) -> str:
        found = await node.sandboxes.create(spec(request_id=f"r{number % 2}" if number < 2 else "r1"))
        ended.append(number)
        return found.id

    waiting = [asyncio.create_task(create(0))]
    await asyncio.sleep(0)
    waiting += [asyncio.create_task(create(number)) for number in (1, 2)]
    await asyncio.sleep(0.01)
    with pytest.raises(ResourceExhausted, match=r"sandboxes: 1 wanted, 0 left"):
        await node.sandboxes.create(spec())  # the queue is full
    await asyncio.sleep(0.05)
    assert ended == []
    await node.sandboxes.delete(made[0].id)
    await asyncio.wait_for(waiting[0], 2)
    await node.sandboxes.delete(made[1].id)
    ids = await asyncio.wait_for(asyncio.gather(*waiting), 3)
    assert ids[1] == ids[2] != ids[0]  # one request that came twice, while both waited
    assert len(node.sandboxes.list()) == 10


async def test_who_waits_too_long_or_leaves_holds_nothing(node: Bench, rules: Callable[..., None]) -> None:
    rules(max_sandboxes=10, queue_length=3, queue_timeout_s=0.1)
    made = [await node.sandboxes.create(spec()) for _ in range(10)]
    with pytest.raises(ResourceExhausted, match="sandboxes: 1 wanted, 0 left"):
        await node.sandboxes.create(spec())
    leaving = asyncio.create_task(node.sandboxes.create(spec()))
    await asyncio.sleep(0.01)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await node.sandboxes.delete(made[0].id)
    await node.sandboxes.create(spec())


async def test_a_drain_sends_away_who_waits(node: Bench, rules: Callable[..., None]) -> None:
    rules(max_sandboxes=10, queue_length=3, queue_timeout_s=5.0)
    for _ in range(10):
        await node.sandboxes.create(spec())
    waiting = asyncio.create_task(node.sandboxes.create(spec()))
    await asyncio.sleep(0.01)
    await node.sandboxes.drain.begin(None)
    with pytest.raises(NodeDraining):
        await asyncio.wait_for(waiting, 2)


async def test_nobody_is_let_in_while_memory_is_short(
    node: Bench, rules: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pressure = tmp_path / "memory"
    monkeypatch.setattr(admission, "_PRESSURE", pressure)
    await node.sandboxes.create(spec())  # a kernel without PSI
    pressure.write_text("some avg10=90.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=40.50 avg60=0.00 total=0\n")
    with pytest.raises(ResourceExhausted, match=r"everything waited for it for 40\.5 % of the last 10 s"):
        await node.sandboxes.create(spec())
    rules(queue_length=1, queue_timeout_s=5.0)
    waiting = asyncio.create_task(node.sandboxes.create(spec()))
    await asyncio.sleep(0.05)
    pressure.write_text("full avg10=0.00 avg60=0.00 total=0\n")
    await asyncio.wait_for(waiting, 3)
