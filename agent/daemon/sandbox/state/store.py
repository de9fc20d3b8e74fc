"""State of the node in SQLite: one row per sandbox, written before any resource of the sandbox is created.

WAL with synchronous=NORMAL survives any crash of the agent; only a crash of the host can lose the last commits, and
that ends the VMs as well. Writes that must outlive a crash of the host are `durable`. All statements run in one thread.

Each record is also copied to a file in its sandbox's directory; a damaged database is rebuilt from these files.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

from agent.common.aio import run_to_completion
from agent.common.atomic_file import write_atomically
from agent.common.errors import HostError, InvalidState
from agent.common.telemetry import STATE_REBUILT, log
from agent.daemon.sandbox.state.record import Record

T = TypeVar("T")
# Migration number N upgrades a database of version N. Released ones never change. New fields of a record need a new
# version as well, so that an older agent refuses the database.
_MIGRATIONS = (
    "CREATE TABLE sandboxes (id TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    # The field `standing` is `maybe_paused` now. Damaged records stay as they are: reading them is the error to report.
    """
    UPDATE sandboxes SET record = json_remove(
        json_set(record, '$.maybe_paused', json(CASE json_type(record, '$.standing') WHEN 'true' THEN 'true'
        ELSE 'false' END)), '$.standing')
    WHERE json_valid(record) AND json_type(record, '$.standing') IN ('true', 'false')
    """,
)
_COPY = "record.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def lock_directory(path: Path) -> int:
    """Lock a directory by the file `path` in it; return the descriptor that holds the lock until it is closed.

    :raises InvalidState: another agent holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise InvalidState(
            f"another sandboxd owns {path.parent}; stop it, or give this one its own paths.state_dir and paths.run_dir"
        ) from None
    return fd


class Store:
    """Records of all sandboxes, and facts about the node by name.

    :param path: the database.
    :param copies: parent of the sandboxes' state directories, each of which gets a copy of its record if it exists.
    """

    def __init__(self, path: Path, copies: Path) -> None:
        self._path = path
        self._copies = copies
        self.rebooted = False  # since the last agent ran
        self.facts: dict[str, str] = {}
        self._writing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._db: sqlite3.Connection | None = None

    async def open(self) -> list[Record]:
        """Open or create the database and return its records; set a damaged one aside and rebuild it.

        :raises HostError: the directory cannot be written (STATE_UNAVAILABLE), or a newer sandboxd wrote the database.
        """
        return await self._run(self._open)

    def _open(self) -> list[Record]:
        try:
            records = self._load()
        except (sqlite3.DatabaseError, ValueError) as error:
            if isinstance(error, sqlite3.OperationalError):
                raise HostError(f"cannot open {self._path}: {error}", reason="STATE_UNAVAILABLE") from error
            records = self._rebuild(error)
        boot_id = _BOOT_ID.read_text().strip()
        self.rebooted = self.facts.get("boot_id", boot_id) != boot_id
        self._set_fact("boot_id", boot_id)
        return records

    def _load(self) -> list[Record]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise HostError(f"{self._path} was written by a newer sandboxd (schema {version}); upgrade this one")
        for number in range(version, len(_MIGRATIONS)):
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(_MIGRATIONS[number])
            self._db.execute(f"PRAGMA user_version={number + 1}")
            self._db.execute("COMMIT")
        self.facts = dict(self._db.execute("SELECT name, value FROM facts").fetchall())
        rows = self._db.execute("SELECT record FROM sandboxes").fetchall()
        return [Record.from_json(text) for (text,) in rows]

    def _rebuild(self, error: Exception) -> list[Record]:
        """Set the database aside and create a new one from the copies of the records."""
        if self._db is not None:
            self._db.close()
        aside = f"{self._path}.damaged-{time.time_ns()}"
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self._path}{suffix}").rename(f"{aside}{suffix}")
        Path(f"{self._path}-shm").unlink(missing_ok=True)
        self._load()
        records = _copied_records(self._copies)
        for record in records:
            self._write("INSERT OR REPLACE INTO sandboxes VALUES (?, ?)", record.id, record.to_json())
        STATE_REBUILT.inc()
        log.error(
            "database damaged: set aside and rebuilt from the copies of the records",
            aside=aside, error=str(error), records=len(records),
        )  # fmt: skip
        return records

    async def put(self, record: Record, *, durable: bool = False) -> None:
        """Write a record as it is in memory.

        :param durable: the write outlives a crash of the host.
        :raises HostError: the disk is full or gone.
        """
        async with self._lock(record.id):
            await self._run(self._writer(record, durable=durable))

    async def change(self, record: Record, edit: Callable[[Record], None], *, durable: bool = False) -> None:
        """Change a record on disk, then in memory: readers see the change once it is stored, or never.

        `edit` changes a copy. Only the fields that it changed are copied back, since others may change meanwhile. A
        cancellation of the caller is raised after the write, when memory and database agree.

        :param durable: the change outlives a crash of the host.
        :raises HostError: the disk is full or gone; nothing has changed.
        """
        async with self._lock(record.id):
            before, draft = record.copy(), record.copy()
            edit(draft)
            writing = asyncio.ensure_future(self._run(self._writer(draft, durable=durable)))
            try:
                await run_to_completion(writing)
            finally:
                if writing.done() and not writing.cancelled() and writing.exception() is None:
                    for name in (field.name for field in dataclasses.fields(Record)):
                        if (value := getattr(draft, name)) != getattr(before, name):
                            setattr(record, name, value)

    def _lock(self, sandbox_id: str) -> asyncio.Lock:
        """Return the lock for writes of one record: the last write has all changes that are in force."""
        return self._writing.setdefault(sandbox_id, asyncio.Lock())

    def _writer(self, record: Record, *, durable: bool) -> Callable[[], None]:
        sandbox_id, text = record.id, record.to_json()

        def write() -> None:
            if durable:
                self._write("PRAGMA synchronous=FULL")
            try:
                self._write("INSERT OR REPLACE INTO sandboxes VALUES (?, ?)", sandbox_id, text)
            finally:
                if durable:
                    with contextlib.suppress(HostError):  # later writes are slower then; this one succeeded
                        self._write("PRAGMA synchronous=NORMAL")
            _copy(self._copies / sandbox_id, text)

        return write

    async def delete(self, sandbox_id: str) -> None:
        """Delete a record. Idempotent.

        :raises HostError: the disk is full or gone.
        """
        async with self._lock(sandbox_id):
            await self._run(lambda: self._write("DELETE FROM sandboxes WHERE id = ?", sandbox_id))

    async def set_fact(self, name: str, value: str) -> None:
        """Store a fact about the node; "" deletes it.

        :raises HostError: the disk is full or gone.
        """
        await self._run(lambda: self._set_fact(name, value))

    def _set_fact(self, name: str, value: str) -> None:
        if self.facts.get(name, "") == value:
            return
        if value:
            self._write("INSERT OR REPLACE INTO facts VALUES (?, ?)", name, value)
            self.facts[name] = value
        else:
            self._write("DELETE FROM facts WHERE name = ?", name)
            self.facts.pop(name, None)

    def _write(self, statement: str, *values: str) -> None:
        assert self._db is not None
        try:
            self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise HostError(f"cannot write {self._path}: {error}", reason="STATE_UNAVAILABLE") from error

    async def _run(self, work: Callable[[], T]) -> T:
        # Shielded: cancelling the caller does not stop a write that has begun.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work))

    async def aclose(self) -> None:
        """Close the database. Idempotent."""
        if self._db is not None:
            db, self._db = self._db, None
            await self._run(db.close)
        self._thread.shutdown(wait=False)


def _copy(directory: Path, text: str) -> None:
    """Copy a record into its sandbox's directory, if that exists; remove a copy that cannot be written."""
    path = directory / _COPY
    try:
        write_atomically(path, text.encode(), mode=0o600, durable=False)  # the directory is open to the sandbox's VMM
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _copied_records(copies: Path) -> list[Record]:
    records = []
    for path in sorted(copies.glob(f"*/{_COPY}")):
        try:
            record = Record.from_json(path.read_text())
        except (OSError, ValueError) as error:
            log.error("copy of a record damaged", path=str(path), error=str(error))
            continue
        if record.id == path.parent.name:
            records.append(record)
    return records
