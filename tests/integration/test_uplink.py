"""The kernel's side of networks by itself: what is left when a create is cancelled or an agent dies."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.common.config.egress import EgressSettings
from agent.common.policy.policy import Policy
from agent.common.policy.rules import parse_rules
from agent.daemon.network.kernel import namespaces
from agent.daemon.network.kernel.kernel_network import KernelNetwork

pytestmark = pytest.mark.vm  # root and namespaces, as for those

ID = "sbx-0000000000000000"


@pytest.fixture
def uplink() -> Iterator[str]:
    """An uplink namespace of the test's own."""
    name = f"egw-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "delete", name], check=True)


def inside(namespace: str, *words: str) -> str:
    return subprocess.run(["ip", "netns", "exec", namespace, *words], check=True, capture_output=True, text=True).stdout


def held(uplink: str) -> tuple[bool, bool]:
    """Returns whether the uplink has our table, and a link of ours."""
    return "sandboxd" in inside(uplink, "nft", "list", "tables"), "sbx0" in inside(uplink, "ip", "-o", "link")


async def test_what_a_dead_agent_left_in_the_uplink_goes_once_nobody_needs_it(uplink: str, tmp_path: Path) -> None:
    settings, marker = EgressSettings(uplink=uplink), tmp_path / "uplink"
    async with namespaces.namespace(ID):
        first = KernelNetwork(settings, marker)
        for sock in await first.setup(ID, Policy(), secrets=False):
            sock.close()
        slot = first.slot(ID)
        await first.aclose()  # as a death: it removes nothing
        assert (held(uplink), marker.exists()) == ((True, True), True)
        second = KernelNetwork(settings, marker)
        second.restore(ID, slot)
        await second.tear_down_unused()
        assert held(uplink) == (True, True)  # it is needed
        await second.update(ID, Policy(allow=parse_rules(["a.example"], "x")), secrets=False)
        assert (held(uplink), marker.exists(), second.slot(ID)) == ((True, False), True, None)
        await second.update(ID, Policy(), secrets=False)
        assert held(uplink) == (True, True)
        await second.aclose()
    third = KernelNetwork(settings, marker)  # and the sandbox is gone with the agent
    await third.tear_down_unused()
    assert (held(uplink)[0], marker.exists()) == (False, False)
    await third.aclose()


@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.003, 0.006, 0.01, 0.02])
async def test_a_cancelled_setup_leaves_nothing(uplink: str, tmp_path: Path, delay_s: float) -> None:
    networks = KernelNetwork(EgressSettings(uplink=uplink), tmp_path / "uplink")
    before = len(os.listdir("/proc/self/fd"))
    async with namespaces.namespace(ID):
        task = asyncio.create_task(networks.setup(ID, Policy(), secrets=False))
        await asyncio.sleep(delay_s)
        task.cancel()
        for result in await asyncio.gather(task, return_exceptions=True):
            for sock in result if isinstance(result, list) else ():
                sock.close()
        await networks.remove(ID)
    await networks.aclose()
    assert held(uplink) == (False, False)
    assert len(os.listdir("/proc/self/fd")) <= before  # one of an earlier test may have been closed meanwhile
