"""The node's state in SQLite: one row per sandbox, written before anything of it is made.

WAL with synchronous=NORMAL survives any crash of the agent; only a crash of the host can lose the last commits, and
that ends the VMs, too. All statements run in one thread of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from agent.errors import HostError, InvalidState
from agent.sandbox.record import Record
from agent.telemetry import log

T = TypeVar("T")
_SCHEMA_VERSION = 1
_SCHEMA = "CREATE TABLE sandboxes (id TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID"


def lock_directory(path: Path) -> int:
    """Returns a descriptor that holds the lock of a directory, the file `path` in it, until it is closed.

    :raises InvalidState: another agent holds it.
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
    """The records of all sandboxes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._db: sqlite3.Connection | None = None

    async def open(self) -> list[Record]:
        """Opens or makes the database and returns what is in it; a damaged one is set aside and said so.

        :raises HostError: the directory cannot be written.
        """
        return await self._run(self._open)

    def _open(self) -> list[Record]:
        try:
            return self._load()
        except (sqlite3.DatabaseError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, sqlite3.OperationalError):
                raise HostError(f"cannot open {self._path}: {error}", reason="STATE_UNAVAILABLE") from error
            if self._db is not None:
                self._db.close()
            aside = f"{self._path}.damaged-{time.time_ns()}"
            for suffix in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError):
                    Path(f"{self._path}{suffix}").rename(f"{aside}{suffix}")
            Path(f"{self._path}-shm").unlink(missing_ok=True)
            log.error("state file is damaged and was set aside", path=aside, error=str(error))
            return self._load()

    def _load(self) -> list[Record]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > _SCHEMA_VERSION:
            raise HostError(f"{self._path} was written by a newer sandboxd (schema {version}); upgrade this one")
        if version == 0:
            self._db.execute(_SCHEMA)
            self._db.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
        rows = self._db.execute("SELECT record FROM sandboxes").fetchall()
        return [Record.from_json(text) for (text,) in rows]

    async def put(self, record: Record) -> None:
        """Writes a record. :raises HostError: the disk is full or gone."""
        await self._execute("INSERT OR REPLACE INTO sandboxes VALUES (?, ?)", record.id, record.to_json())

    async def delete(self, sandbox_id: str) -> None:
        """Removes a record. Idempotent."""
        await self._execute("DELETE FROM sandboxes WHERE id = ?", sandbox_id)

    async def _execute(self, statement: str, *values: str) -> None:
        def execute() -> None:
            assert self._db is not None
            try:
                self._db.execute(statement, values)
            except sqlite3.Error as error:
                raise HostError(f"cannot write {self._path}: {error}", reason="STATE_UNAVAILABLE") from error

        await self._run(execute)

    async def _run(self, work: Callable[[], T]) -> T:
        # Shielded: a write that has begun is not undone by a caller that leaves.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work))

    async def aclose(self) -> None:
        """Closes the database. Idempotent."""
        if self._db is not None:
            db, self._db = self._db, None
            await self._run(db.close)
        self._thread.shutdown(wait=False)
