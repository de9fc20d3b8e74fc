"""Denials by id: where they are counted, and until when."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any, cast

import pytest

from agent.common.errors import HostError
from agent.common.model import NetSpec
from agent.common.policy.reasons import Denial, Reason
from agent.daemon.network.sandbox_network import KernelState
from agent.daemon.sandbox.machine.record_network import RecordNetwork
from agent.daemon.sandbox.state.denials import Denials
from agent.daemon.sandbox.state.record import Record
from tests.support.daemon_fakes import OPERATOR, FakeNetwork, World, record


def made(told: list[tuple[str, Denial]]) -> tuple[FakeNetwork, RecordNetwork, Denials]:
    fake = FakeNetwork(World())
    denials = Denials(lambda record, denial: told.append((record.id, denial)))
    return fake, RecordNetwork(cast("Any", fake), OPERATOR, denials), denials


async def test_denials_are_counted_and_told_as_long_as_there_is_a_network() -> None:
    told: list[tuple[str, Denial]] = []
    fake, network, denials = made(told)
    kept, denial = record(), Denial(Reason.HOST_NOT_ALLOWED, "a.example", 443, "tls", 2)
    denials.count(kept.id, Reason.HOST_NOT_ALLOWED, 1)
    denials.report(kept.id, denial)
    assert (kept.denials, told) == ({}, [])
    async with AsyncExitStack() as stack:
        await network.make(kept, stack)
        denials.count(kept.id, Reason.HOST_NOT_ALLOWED, 2)
        denials.report(kept.id, denial)
        fake.drops = {Reason.SPOOFED: 5}
        await network.count_drops(kept.id)
        assert kept.denials == {"host_not_allowed": 2, "spoofed": 5}
    assert kept.denials == {"host_not_allowed": 2, "spoofed": 10}  # those since the last look, too
    assert told == [(kept.id, denial), *[(kept.id, Denial(Reason.SPOOFED, "", 0, "ip", 5))] * 2]
    denials.count(kept.id, Reason.HOST_NOT_ALLOWED, 1)
    await network.remove(kept.id)
    assert kept.denials == {"host_not_allowed": 2, "spoofed": 10}


@pytest.mark.parametrize("fault", [HostError("no"), RuntimeError("no")])
async def test_the_record_has_the_kernels_state_after_a_failed_update(fault: Exception) -> None:
    fake, network, _ = made([])
    kept: Record = record(slot=3, rules="old", net=NetSpec(allow=()))
    await network.adopt(kept, 1)
    assert (kept.slot, kept.rules) == (3, "old")
    fake.kernel_states[kept.id] = KernelState(None, "")
    fake.update_faults = [fault]
    with pytest.raises(type(fault)):
        await network.update(kept)
    assert (kept.slot, kept.rules) == (None, "")
