"""What survives a restart: records, the database that holds them, the locks, and events to watchers."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sqlite3
from pathlib import Path

import pytest

from agent.common.background import Supervisor
from agent.common.config.settings import Settings
from agent.common.errors import HostError, InvalidState
from agent.common.model import TRANSITIONS, Lifetime, NetSpec, SandboxSpec, SecretSpec, State
from agent.common.policy.rules import Rule, parse_rule
from agent.daemon.sandbox.capacity.drain import Drain
from agent.daemon.sandbox.capacity.node import Node
from agent.daemon.sandbox.machine.vm_shape import Shape
from agent.daemon.sandbox.state.events import Events, EventType, WatcherTooSlowError
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.store import Store, lock_directory
from tests.support.daemon_fakes import VMM, SilentObserver, record, spec

# As 0.1.0 wrote it, no field of its default.
RECORD_OF_0_1_0 = (
    r'{"id":"sbx-0123456789abcdef","spec":{"image":"default","vcpu_count":2,"memory_bytes":1073741824,'
    r'"disk_bytes":4294967296,"env":{"A":"\u00e9 \udc80\n"},"labels":{"team":"a"},"lifetime":{"duration_s":60.0,'
    r'"lease_s":null,"idle_s":30.5},"request_id":"r-1","net":{"allow":["a.example","10.1.0.0/16"],"tenant":"acme",'
    r'"inspect":true},"secrets":[{"name":"TOKEN","hosts":["api.example","*.b.example:443"],'
    r'"placeholder":"sbx_secret_0011","in_body":true,"redact":false}],"root":"vol-0123456789abcdef",'
    r'"volumes":[["/data","vol-fedcba9876543210"]]},"state":"suspended","create_time":1790000000.25,'
    r'"labels":{"team":"b"},"image_digest":"abababababababababababababababababababababababababababababababab",'
    r'"expire_time":1790000060.25,"expire_uptime":12345.5,"error":"why","vmm":"qemu 8.2","phases":[["disk",0.5],'
    r'["boot",1.0]],"token":{"pid":"12","started":"34"},"template":"0f0f0f0f0f0f0f0f","shape":{"image_digest":"ab",'
    r'"vcpu_count":2,"memory_bytes":1124073472,"cmdline":"quiet","snapshot_key":"k","link":"vsock","slots":2},'
    r'"parent":"sbx-aaaaaaaaaaaaaaaa","slot":7,"uid":1900000003,"rules":"00ff00ff00ff00ff","net":{"allow":null,'
    r'"tenant":"acme","inspect":false},"secrets":[{"name":"TOKEN","hosts":["api.example","*.b.example:443"],'
    r'"placeholder":"sbx_secret_0011","in_body":true,"redact":false},{"name":"B","hosts":[],"placeholder":"p",'
    r'"in_body":false,"redact":true}],"denials":{"not_allowed":3},'
    r'"fingerprint":"cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd","standing":true}'
)
RECORD_OF_NOW = RECORD_OF_0_1_0.replace('"standing":true', '"maybe_paused":true')


def rules(*texts: str) -> tuple[Rule, ...]:
    return tuple(parse_rule(text) for text in texts)


def test_a_record_of_0_1_0_is_read_and_written_with_the_present_names() -> None:
    kept = Record.from_json(RECORD_OF_0_1_0)
    secret = SecretSpec("TOKEN", rules("api.example", "*.b.example:443"), "sbx_secret_0011", in_body=True, redact=False)
    assert kept == Record(
        id="sbx-0123456789abcdef",
        spec=SandboxSpec(
            "default", 2, 1 << 30, 4 << 30, env={"A": "\u00e9 \udc80\n"}, labels={"team": "a"},
            lifetime=Lifetime(duration_s=60.0, idle_s=30.5), request_id="r-1",
            net=NetSpec(rules("a.example", "10.1.0.0/16"), "acme", inspect=True), secrets=(secret,),
            root="vol-0123456789abcdef", volumes=(("/data", "vol-fedcba9876543210"),),
        ),
        state=State.SUSPENDED, create_time=1790000000.25, labels={"team": "b"}, image_digest="ab" * 32,
        expire_time=1790000060.25, expire_uptime=12345.5, error="why", vmm="qemu 8.2",
        phases=[("disk", 0.5), ("boot", 1.0)], token={"pid": "12", "started": "34"}, template="0f" * 8,
        shape=dataclasses.asdict(Shape("ab", 2, 1124073472, "quiet", "k", "vsock", 2)), parent="sbx-aaaaaaaaaaaaaaaa",
        slot=7, uid=1900000003, rules="00ff" * 4, net=NetSpec(None, "acme"),
        secrets=(secret, SecretSpec("B", (), "p")), denials={"not_allowed": 3}, fingerprint="cd" * 32,
        maybe_paused=True,
    )  # fmt: skip
    assert kept.to_json() == RECORD_OF_NOW
    assert Record.from_json(RECORD_OF_NOW) == kept
    assert set(json.loads(RECORD_OF_NOW)) == {field.name for field in dataclasses.fields(Record)}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "{}", "[" * 100_000, RECORD_OF_0_1_0[:-1],
        RECORD_OF_0_1_0.replace('"suspended"', '"asleep"'), RECORD_OF_0_1_0.replace('"vcpu_count":2,', "", 1),
        RECORD_OF_0_1_0.replace('"vcpu_count":2', '"vcpu_count":"2"'),
        RECORD_OF_0_1_0.replace('"slot":7', '"slot":"7"'),
        RECORD_OF_0_1_0.replace('"10.1.0.0/16"', '"http://a.example"'), RECORD_OF_0_1_0.replace('"10.1.0.0/16"', "7"),
        RECORD_OF_0_1_0.replace('"pid":"12"', '"pid":12'), RECORD_OF_0_1_0.replace("0.5]", '"half"]'),
        RECORD_OF_0_1_0.replace('"standing":true', '"standing":1'),
        RECORD_OF_NOW.replace('"maybe_paused":true', '"maybe_paused":1'),
        RECORD_OF_0_1_0.replace('"state"', '"status"'),
    ],
)  # fmt: skip
def test_what_is_no_record(text: str) -> None:
    assert text != RECORD_OF_0_1_0
    with pytest.raises(ValueError, match=r"."):
        Record.from_json(text)


async def test_a_damaged_deadline_does_not_end_a_drain(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db", tmp_path / "sandboxes")
    await store.open()
    for text, expected in (
        ('{"evict_at": 1e15}', True), ('{"evict_at":null}', False), ("{", False), ('{"evict_at": "soon"}', False),
    ):  # fmt: skip
        await store.set_fact("drain", text)
        async with Supervisor(SilentObserver()) as supervisor:
            draining = Node(Settings(), VMM, supervisor)
            drain = Drain(draining, store, lambda: 1, lambda: asyncio.sleep(0), supervisor)
            drain.restore()
            assert draining.draining == "it is drained"
            assert (drain._eviction is not None) == expected
        await drain.aclose()
    await store.aclose()


def test_a_record_survives_its_json() -> None:
    kept = record(
        spec=spec(env={"A": "\udc80"}, lifetime=Lifetime(lease_s=3.0), request_id="r"), labels={"a": "b"},
        phases=[("disk", 0.5)], expire_time=9.0, error="why", state=State.FAILED,
    )  # fmt: skip
    assert Record.from_json(kept.to_json()) == kept


def test_a_copy_is_not_touched_by_later_changes() -> None:
    kept = record(labels={"a": "b"})
    copy = kept.copy()
    kept.labels["a"] = "c"
    assert copy.labels == {"a": "b"}


def test_only_the_transitions_of_the_table_are_possible() -> None:
    for old in State:
        for new in State:
            kept = record(state=old)
            if new in TRANSITIONS[old]:
                kept.move(new)
                assert kept.state is new
            else:
                with pytest.raises(InvalidState, match=f"is {old}; it cannot become {new}"):
                    kept.move(new)


async def test_what_is_put_is_there_after_a_restart(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db", tmp_path / "sandboxes")
    assert await store.open() == []
    one, two = record(), record(id="sbx-0000000000000001")
    await store.put(one)
    await store.put(two)
    one.labels = {"a": "b"}
    await store.put(one)
    await store.delete(two.id)
    await store.delete(two.id)
    await store.aclose()
    await store.aclose()
    again = Store(tmp_path / "state.db", tmp_path / "sandboxes")
    assert await again.open() == [one]
    await again.aclose()


@pytest.mark.parametrize("damage", ["garbage", "record"])
async def test_a_damaged_file_is_set_aside_not_emptied(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.db"
    if damage == "garbage":
        path.write_bytes(b"this is no database, however long one looks at it" * 100)
    else:
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE sandboxes (id TEXT PRIMARY KEY, record TEXT NOT NULL)")
            db.execute("INSERT INTO sandboxes VALUES ('x', '{}')")
            db.execute("CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
            db.execute("PRAGMA user_version=2")
        db.close()
    before = path.read_bytes()
    store = Store(path, tmp_path / "sandboxes")
    assert await store.open() == []
    await store.put(record())
    await store.aclose()
    (aside,) = [found for found in tmp_path.glob("state.db.damaged-*") if not found.name.endswith(("-wal", "-shm"))]  # noqa: ASYNC240
    assert aside.read_bytes()[100:] == before[100:]  # SQLite may note the journal mode in its header


async def test_a_damaged_file_is_rebuilt_from_the_copies_of_its_records(tmp_path: Path) -> None:
    copies = tmp_path / "sandboxes"
    store = Store(tmp_path / "state.db", copies)
    await store.open()
    kept, changed, gone, unmade = (record(id=f"sbx-{number:016}") for number in range(4))
    for known in (kept, changed, gone):
        (copies / known.id).mkdir(parents=True)
        await store.put(known)
    await store.put(unmade)  # its directory was not made yet: there is nothing of it
    changed.labels = {"a": "b"}
    await store.put(changed)
    (copies / gone.id / "record.json").write_text("{")
    await store.aclose()
    (tmp_path / "state.db").write_bytes(b"not a database at all, but of some length" * 50)
    again = Store(tmp_path / "state.db", copies)
    assert await again.open() == [kept, changed]
    await again.aclose()
    once_more = Store(tmp_path / "state.db", copies)
    assert await once_more.open() == [kept, changed]
    await once_more.aclose()


async def test_a_database_of_the_first_schema_is_brought_to_this_one(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute("CREATE TABLE sandboxes (id TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID")
        values = json.loads(record().to_json())
        for later in ("expire_uptime", "shape", "parent"):
            del values[later]
        del values["spec"]["lifetime"]["idle_s"]
        db.execute("INSERT INTO sandboxes VALUES (?, ?)", (record().id, json.dumps(values)))
        db.execute("PRAGMA user_version=1")
    db.close()
    store = Store(tmp_path / "state.db", tmp_path / "sandboxes")
    assert await store.open() == [record()]
    assert not store.rebooted
    await store.set_fact("a", "b")
    await store.aclose()
    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute("UPDATE facts SET value = 'another' WHERE name = 'boot_id'")
    db.close()
    again = Store(tmp_path / "state.db", tmp_path / "sandboxes")
    assert await again.open() == [record()]
    assert again.rebooted
    assert again.facts["a"] == "b"
    await again.aclose()


def _database_of_0_1_0(path: Path, *rows: tuple[str, str]) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE sandboxes (id TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID")
        db.execute("CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
        db.executemany("INSERT INTO sandboxes VALUES (?, ?)", rows)
        db.execute("PRAGMA user_version=2")
    db.close()


async def test_a_row_of_0_1_0_is_migrated(tmp_path: Path) -> None:
    """All of it but the renamed field stays as it was, a lone surrogate included; a label of the old name, too."""
    expected = Record.from_json(RECORD_OF_NOW)
    running = record(labels={"standing": "true"})
    of_0_1_0 = running.to_json().replace('"maybe_paused":false', '"standing":false')
    path = tmp_path / "state.db"
    _database_of_0_1_0(path, (expected.id, RECORD_OF_0_1_0), ("sbx-later", of_0_1_0))
    store = Store(path, tmp_path / "sandboxes")
    records = await store.open()
    await store.aclose()
    assert records == [expected, running]
    with sqlite3.connect(path) as db:
        rows = [text for (text,) in db.execute("SELECT record FROM sandboxes")]
    db.close()
    assert rows == [RECORD_OF_NOW, running.to_json()]


async def test_a_damaged_database_of_0_1_0_is_rebuilt_from_copies_of_0_1_0(tmp_path: Path) -> None:
    expected = Record.from_json(RECORD_OF_NOW)
    copy = tmp_path / "sandboxes" / expected.id / "record.json"
    copy.parent.mkdir(parents=True)
    copy.write_text(RECORD_OF_0_1_0)
    _database_of_0_1_0(tmp_path / "state.db", (expected.id, "{"))
    store = Store(tmp_path / "state.db", tmp_path / "sandboxes")
    assert await store.open() == [expected]
    await store.aclose()


def test_the_present_name_of_a_field_wins() -> None:
    both = RECORD_OF_0_1_0.replace('"standing":true', '"standing":true,"maybe_paused":false')
    assert not Record.from_json(both).maybe_paused


async def test_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    store = Store(tmp_path / "state.db", tmp_path / "sandboxes")
    with pytest.raises(HostError, match="newer sandboxd"):
        await store.open()
    await store.aclose()


async def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    store = Store(tmp_path, tmp_path / "sandboxes")  # a directory
    with pytest.raises(HostError, match="cannot open"):
        await store.open()
    await store.aclose()


def test_one_directory_has_one_agent(tmp_path: Path) -> None:
    held = lock_directory(tmp_path / "new" / "agent.lock")
    with pytest.raises(InvalidState, match="another sandboxd owns"):
        lock_directory(tmp_path / "new" / "agent.lock")
    os.close(held)
    os.close(lock_directory(tmp_path / "new" / "agent.lock"))


async def test_a_watcher_sees_the_present_then_changes() -> None:
    events = Events()
    present = record()
    watching = events.watch([present], lambda found: found.id == present.id)
    first = await anext(watching)
    assert (first.type, first.record) == (EventType.SNAPSHOT, present)
    events.publish(EventType.UPDATED, record(id="sbx-other"))
    events.publish(EventType.DELETED, present, "expired")
    assert (await anext(watching)).type is EventType.SYNCED
    last = await anext(watching)
    assert (last.type, last.reason) == (EventType.DELETED, "expired")
    await watching.aclose()  # type: ignore[attr-defined]


async def test_a_slow_watcher_is_told_and_slows_nobody() -> None:
    events = Events()
    slow = events.watch([], lambda _: True)
    assert (await anext(slow)).type is EventType.SYNCED
    for _ in range(5000):
        events.publish(EventType.UPDATED, record())
    for _ in range(1024):
        await anext(slow)
    with pytest.raises(WatcherTooSlowError, match="watch again"):
        await anext(slow)
