"""Templates over a fake host: made once, shared, checked, kept within a budget, made again when they are damaged."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.common import atomic_file
from agent.common.config.daemon import TemplateSettings
from agent.common.errors import GuestUnreachable, HostError, InvalidState, NotFound, VmmError
from agent.daemon.sandbox.machine.vm_shape import ram_bytes
from agent.daemon.sandbox.templates import builder
from agent.daemon.sandbox.templates.catalog import Templates
from tests.support.daemon_fakes import MIB, Bench, FakeDriver, bench, spec

MADE = 2  # a template takes two VMs: the one that is frozen, and the one that proves that it can be restored


@pytest.fixture(autouse=True)
def _no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "_SETTLE_S", 0.0)


@pytest.fixture
async def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    async with bench(tmp_path, monkeypatch, templates=TemplateSettings()) as made:
        yield made


def templates_of(host: Bench) -> Templates:
    assert host.sandboxes.templates is not None
    return host.sandboxes.templates


def files(host: Bench) -> list[str]:
    folder = host.host.paths.templates
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


async def create_and_delete(host: Bench, **fields: object) -> str:
    """Returns the template that the sandbox came from."""
    record = await host.sandboxes.create(spec(**fields))
    await host.sandboxes.delete(record.id)
    return record.template


async def test_a_template_is_made_once_and_used_again(host: Bench) -> None:
    first = await create_and_delete(host)
    assert host.world.starts == MADE + 1
    assert await create_and_delete(host) == first
    assert host.world.starts == MADE + 2
    assert files(host) == [first]
    assert host.left() == []


async def test_a_new_template_outlives_a_power_cut(host: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    sync = atomic_file.sync

    def note_and_sync(path: Path) -> None:
        synced.append(path)
        sync(path)

    monkeypatch.setattr(atomic_file, "sync", note_and_sync)
    name = await create_and_delete(host)
    folder = host.host.paths.templates
    contents = {path.name for path in (folder / name).rglob("*")}
    before_rename = {path.name for path in synced[: synced.index(folder)]}
    assert contents <= before_rename
    assert {"ram", "manifest.json"} <= contents


async def test_creates_at_once_wait_for_one_maker(host: Bench) -> None:
    records = await asyncio.gather(*(host.sandboxes.create(spec()) for _ in range(5)))
    assert len({record.template for record in records}) == 1
    assert host.world.starts == MADE + 5


async def test_other_sizes_and_another_vmm_have_templates_of_their_own(host: Bench) -> None:
    names = {await create_and_delete(host), await create_and_delete(host, vcpu_count=2)}
    names.add(await create_and_delete(host, memory_bytes=128 * MIB))
    driver = host.host.driver
    assert isinstance(driver, FakeDriver)
    driver.info = dataclasses.replace(driver.info, snapshot_key="fake 2.0")
    names.add(await create_and_delete(host))
    assert len(names) == 4


@pytest.mark.parametrize("name", ["ram", "vmm/state"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
async def test_a_damaged_template_is_made_again(host: Bench, name: str, damage: str) -> None:
    template = await create_and_delete(host)
    path = host.host.paths.templates / template / name
    path.chmod(0o644)
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
    host.world.starts = 0
    assert await create_and_delete(host) == template
    assert host.world.starts == MADE + 1


async def test_a_new_agent_checks_what_it_finds(host: Bench) -> None:
    template = await create_and_delete(host)
    folder = host.host.paths.templates
    (folder / f"tmp-{template}-left").mkdir()
    again = Templates(host.host)
    again.open()
    assert files(host) == [template]
    host.world.starts = 0
    found = await again.get(host.sandboxes.images.get("minimal"), 1, spec().memory_bytes)
    assert (found.digest, host.world.starts) == (template, 0)
    flipped = folder / template / "vmm" / "state"
    flipped.chmod(0o644)
    flipped.write_bytes(b"melted")
    last = Templates(host.host)
    await last.get(host.sandboxes.images.get("minimal"), 1, spec().memory_bytes)
    assert host.world.starts == MADE


@pytest.mark.parametrize("phase", ["disk", "netns", "vmm.start", "dial"])
async def test_a_maker_that_fails_leaves_nothing_and_the_next_one_works(host: Bench, phase: str) -> None:
    host.world.faults[phase] = HostError("no")
    with pytest.raises(HostError):
        await host.sandboxes.create(spec())
    assert (files(host), host.left(), host.sandboxes.list()) == ([], [], [])
    host.world.faults.clear()
    await create_and_delete(host)


async def test_a_maker_that_is_cancelled_leaves_nothing(host: Bench) -> None:
    host.world.hangs.add("dial")
    creating = asyncio.create_task(host.sandboxes.create(spec()))
    await host.world.reached["dial"].wait()
    await templates_of(host).aclose()
    with contextlib.suppress(asyncio.CancelledError, InvalidState):
        await creating
    assert (files(host), host.left()) == ([], [])


async def test_a_full_disk_says_what_to_do(host: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(Exception, match="no space left for a template") as caught:
        await host.sandboxes.create(spec())
    assert getattr(caught.value, "reason", "") == "DISK_FULL"
    assert (files(host), host.left()) == ([], [])


async def test_a_clone_that_fails_is_tried_again(host: Bench) -> None:
    host.world.clone_faults = [GuestUnreachable("deaf"), GuestUnreachable("deaf")]
    record = await host.sandboxes.create(spec())
    assert host.world.starts == MADE + 3
    assert list(host.world.vms) == [record.id]


async def test_a_clone_that_always_fails_is_given_up_after_three(host: Bench) -> None:
    host.world.clone_faults = [GuestUnreachable("deaf")] * 9
    with pytest.raises(GuestUnreachable, match="deaf"):
        await host.sandboxes.create(spec())
    assert len(host.world.clone_faults) == 6
    assert host.left() == []


async def test_a_template_that_the_vmm_refuses_is_made_again(host: Bench) -> None:
    await create_and_delete(host)
    host.world.starts = 0
    host.world.clone_faults = [VmmError("bad state", reason="VMM_NOT_STARTED")]
    await create_and_delete(host)
    assert host.world.starts == 1 + MADE + 1


async def test_a_template_stays_if_the_vmm_takes_no_other_either(host: Bench) -> None:
    template = await create_and_delete(host)
    host.world.faults["vmm.start"] = VmmError("no such file", reason="VMM_NOT_STARTED")
    with pytest.raises(VmmError, match="no such file"):
        await host.sandboxes.create(spec())
    assert (files(host), host.left()) == ([template], [])
    host.world.faults.clear()
    host.world.starts = 0
    assert await create_and_delete(host) == template
    assert host.world.starts == 1


async def test_a_template_that_was_touched_and_is_sound_serves_on(host: Bench) -> None:
    template = await create_and_delete(host)
    (host.host.paths.templates / template / "ram").touch()
    host.world.starts = 0
    assert await create_and_delete(host) == template
    assert host.world.starts == 1


async def test_the_budget_takes_the_least_used_and_never_one_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, templates=TemplateSettings(budget_bytes=1)) as host:
        running = await host.sandboxes.create(spec())
        idle = await create_and_delete(host, vcpu_count=2)
        assert files(host) == sorted([running.template, idle])
        newest = await create_and_delete(host, vcpu_count=3)
        assert files(host) == sorted([running.template, newest])
        with pytest.raises(InvalidState, match="in use"):
            templates_of(host).remove(running.template)
        await host.sandboxes.delete(running.id)
        templates_of(host).remove(running.template)
        assert files(host) == [newest]
        with pytest.raises(NotFound):
            templates_of(host).remove(running.template)


@pytest.mark.parametrize("asked_mib", [128, 200, 256, 512, 1280, 4096, 65536])
def test_ram_is_what_the_guest_needs_to_see_what_was_asked(asked_mib: int) -> None:
    asked = asked_mib * MIB
    given = ram_bytes(asked)
    seen = given - (38 * MIB + given * 16 // 1000)
    assert asked <= seen <= asked * 1.05
    assert given % MIB == 0
