"""Log files of bounded size: bounded on disk, and a failed write loses one piece only."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.daemon.vmm.rotating_log import RotatingLog

pytestmark = pytest.mark.timeout(30)


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(st.lists(st.binary(max_size=60), max_size=40), st.integers(1, 100), st.integers(0, 200))
def test_the_tail_is_the_end_and_the_files_are_bounded(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], limit: int, wanted: int
) -> None:
    directory = tmp_path_factory.mktemp("log")
    log = RotatingLog(directory / "log", limit)
    for piece in pieces:
        log.append(piece)
        assert sum(path.stat().st_size for path in directory.iterdir()) <= limit + 1
    printed = b"".join(pieces)
    tail = log.tail(wanted)
    assert printed.endswith(tail)
    assert len(tail) <= wanted
    assert len(tail) >= min(wanted, len(printed), limit // 2)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE])
def test_a_failed_write_loses_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    log = RotatingLog(tmp_path / "log", 20)
    log.append(b"before;")
    with monkeypatch.context() as patch:
        patch.setattr(RotatingLog, "_open", lambda _: _fail(number))
        log.append(b"lost")  # rotates, then fails to open the new file
    log.append(b"after")
    assert log.tail(100) == b"before;after"


def _fail(number: int) -> IO[bytes]:
    raise OSError(number, os.strerror(number))


def test_a_link_or_a_fifo_in_the_place_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"")
    (tmp_path / "log").symlink_to(tmp_path / "other")
    log = RotatingLog(tmp_path / "log", 1000)
    log.create()
    log.append(b"text")
    assert (tmp_path / "other").read_bytes() == b""
    (tmp_path / "log").unlink()
    os.mkfifo(tmp_path / "log")
    log.append(b"text")
    (tmp_path / "log").unlink()
    log.append(b"kept")
    assert (tmp_path / "log").read_bytes() == b"kept"


def test_an_empty_log(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "log", 10)
    assert log.tail(10) == b""
    log.create()
    assert (tmp_path / "log").read_bytes() == b""
    RotatingLog(tmp_path / "none" / "log", 10).create()
