"""`sandboxctl cp` and `port-forward`."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import MIB
from tests.support.ctl import TIMEOUT_S, Ctl

pytestmark = pytest.mark.vm


# -- files -------------------------------------------------------------------------------------------------------------


def _facts(root: Path) -> dict[bytes, tuple[Any, ...]]:
    """What `cp` must keep of everything below a folder."""
    found: dict[bytes, tuple[Any, ...]] = {}
    for folder, folders, files in os.walk(os.fsencode(root)):
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            facts = os.lstat(path)
            kind = stat.S_IFMT(facts.st_mode)
            content: Any = None
            if kind == stat.S_IFREG:
                content = Path(os.fsdecode(path)).read_bytes()
            elif kind == stat.S_IFLNK:
                content = os.readlink(path)
            times = None if kind == stat.S_IFLNK else facts.st_mtime_ns
            mode = None if kind == stat.S_IFLNK else stat.S_IMODE(facts.st_mode)
            found[path[len(os.fsencode(root)) :]] = (kind, mode, times, content)
    return found


def _plant(root: Path) -> None:
    """Makes a tree of all that is odd."""
    (root / "empty").mkdir(parents=True)
    (root / "deep" / "er" / "still").mkdir(parents=True)
    (root / "deep" / "er" / "still" / "file").write_text("deep\n")
    (root / "private").write_text("secret")
    (root / "private").chmod(0o600)
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o751)
    (root / "nothing").touch()
    (root / "new\nline and 'quotes' \"and\" $HOME ü").write_text("odd")
    (root / "link").symlink_to("private")
    (root / "dangling").symlink_to("/no/where")
    (root / "loop").symlink_to(".")
    raw = os.fsencode(root)
    os.mkdir(raw + b"/\xff\xfe")
    Path(os.fsdecode(raw + b"/\xff\xfe/\n\xff\n")).write_bytes(b"not UTF-8\0")
    os.symlink(b"\xff", raw + b"/to \xff")
    (root / "big").write_bytes(os.urandom(20 * MIB))
    os.utime(root / "private", ns=(10**18 + 1, 10**18 + 123_456_789))
    os.utime(root / "empty", ns=(10**18, 10**18))
    (root / "deep").chmod(0o555)


def test_a_tree_goes_there_and_back_unchanged(ctl: Ctl, ctl_box: str, tmp_path: Path) -> None:
    _plant(tmp_path / "tree")
    (report,) = ctl.objects("cp", str(tmp_path / "tree"), f"{ctl_box}:copied")
    assert (report["files"], report["folders"], report["links"]) == (7, 6, 4)
    assert report["bytes"] > 20 * MIB
    listed = ctl(
        "exec", "-u", "root", ctl_box, "find", "/home/sandbox/copied", "-name", "private", "-printf", "%m %T@ %u"
    )
    assert listed == b"600 1000000000.1234567890 root"
    ctl("cp", f"{ctl_box}:/home/sandbox/copied", str(tmp_path / "back"))
    assert _facts(tmp_path / "back") == _facts(tmp_path / "tree")
    # Again, over what is there: into the folder, as cp does, and with the contents alone.
    ctl("cp", f"{ctl_box}:copied", str(tmp_path / "back"))
    assert _facts(tmp_path / "back" / "copied") == _facts(tmp_path / "tree")
    ctl("cp", f"{tmp_path}/tree/deep/er/.", f"{ctl_box}:copied/empty")
    assert ctl("exec", ctl_box, "cat", "copied/empty/still/file") == b"deep\n"
    ctl("exec", "-u", "root", ctl_box, "rm", "-r", "/home/sandbox/copied")


def test_single_files_and_streams(ctl: Ctl, ctl_box: str, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    ctl("cp", "-", f"{ctl_box}:/tmp/stream", stdin=data)
    assert ctl("cp", f"{ctl_box}:/tmp/stream", "-") == data
    ctl("cp", f"{ctl_box}:/tmp/stream", str(tmp_path))
    assert (tmp_path / "stream").read_bytes() == data
    odd = os.fsdecode(b"\xff")
    (tmp_path / odd).write_bytes(b"odd")
    ctl("cp", f"{tmp_path}/{odd}", f"{ctl_box}:/tmp")
    ctl("cp", f"{ctl_box}:/tmp/{odd}", f"{tmp_path}/again")
    assert (tmp_path / "again").read_bytes() == b"odd"
    ctl("exec", ctl_box, "ln", "-s", "/tmp/stream", "way")
    ctl("cp", f"{ctl_box}:way", str(tmp_path))
    assert (tmp_path / "way").readlink() == Path("/tmp/stream")
    ctl("cp", "-L", f"{ctl_box}:way", str(tmp_path / "followed"))
    assert (tmp_path / "followed").read_bytes() == data


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["{ctl_box}:/none", "{here}/x"], "ENOENT"),
        (["{ctl_box}:/etc/passwd", "{here}/none/x"], "ENOENT"),
        (["{here}/none", "{ctl_box}:/tmp"], "OS_ERROR"),
        (["{here}/file", "{ctl_box}:/none/x"], "NOT_FOUND"),
        (["{here}", "{ctl_box}:/etc/passwd"], "NOT_A_FOLDER"),
        (["sbx-0000000000000000:/x", "{here}/x"], "SANDBOX_NOT_FOUND"),
    ],
)
def test_copies_that_cannot_be(ctl: Ctl, ctl_box: str, tmp_path: Path, words: list[str], reason: str) -> None:
    (tmp_path / "file").touch()
    ctl("cp", *(word.format(ctl_box=ctl_box, here=tmp_path) for word in words), status=1)
    assert f"({reason})" in ctl.err or (reason == "NOT_FOUND" and "(ENOENT)" in ctl.err)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_devices_are_left_out(ctl: Ctl, ctl_box: str, tmp_path: Path) -> None:
    ctl("exec", ctl_box, "sh", "-c", "mkdir /tmp/special; mkfifo /tmp/special/pipe; echo x >/tmp/special/file")
    ctl("cp", f"{ctl_box}:/tmp/special", str(tmp_path), status=1)
    assert "skipped /tmp/special/pipe" in ctl.err
    assert [entry.name for entry in (tmp_path / "special").iterdir()] == ["file"]


# -- ports -------------------------------------------------------------------------------------------------------------

_ECHO = """
import socket, threading
server = socket.create_server(("127.0.0.1", 9000))
def serve(connection):
    with connection:
        data = b""
        while piece := connection.recv(65536):
            data += piece
        connection.sendall(b"%d " % len(data) + data)
def greet():
    greeter = socket.create_server(("127.0.0.1", 9001))
    while True:
        connection, _ = greeter.accept()
        connection.sendall(b"bye")
        connection.close()
threading.Thread(target=greet, daemon=True).start()
print("up", flush=True)
while True:
    connection, _ = server.accept()
    threading.Thread(target=serve, args=(connection,), daemon=True).start()
"""


@contextmanager
def forwarded(ctl: Ctl, *words: str) -> Iterator[tuple[str, int]]:
    forwarding = ctl.start("--json", "port-forward", *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert forwarding.stdout is not None
    with forwarding:
        try:
            ready = json.loads(forwarding.stdout.readline())
            yield ready["host"], ready["port"]
        finally:
            forwarding.send_signal(signal.SIGINT)
            assert forwarding.wait(TIMEOUT_S) == 130


def _exchange(address: tuple[str, int], data: bytes) -> bytes:
    with socket.create_connection(address, TIMEOUT_S) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def _read_all(connections: Sequence[socket.socket]) -> list[bytes]:
    return [b"".join(iter(lambda one=one: one.recv(65536), b"")) for one in connections]  # type: ignore[misc]


def test_port_forward(ctl: Ctl, ctl_box: str) -> None:
    server = ctl.start("exec", ctl_box, "python3", "-c", _ECHO, stdout=subprocess.PIPE)
    assert server.stdout is not None
    with server:
        assert server.stdout.readline() == b"up\n"
        with forwarded(ctl, ctl_box, ":9000") as address:
            assert address[0] == "127.0.0.1"
            data = os.urandom(MIB)
            assert _exchange(address, data) == b"%d " % len(data) + data
            # Many at once: all are open before the first one is answered.
            many = [socket.create_connection(address, TIMEOUT_S) for _ in range(10)]
            for index, one in enumerate(many):
                one.sendall(b"x" * index)
            for one in many:
                one.shutdown(socket.SHUT_WR)
            assert _read_all(many) == [b"%d " % index + b"x" * index for index in range(10)]
            for one in many:
                one.close()
        with forwarded(ctl, ctl_box, "0:9001") as address, socket.create_connection(address, TIMEOUT_S) as connection:
            # The server ends first, while the client's side stays open.
            assert _read_all([connection]) == [b"bye"]
        server.send_signal(signal.SIGINT)
        assert server.wait(TIMEOUT_S) == 130


def test_a_port_that_nobody_listens_on(ctl: Ctl, ctl_box: str) -> None:
    with forwarded(ctl, ctl_box, ":9999") as address, pytest.raises(ConnectionResetError):
        _exchange(address, b"x")
    ctl("port-forward", "sbx-0000000000000000", "80", status=1)
    assert "SANDBOX_NOT_FOUND" in ctl.err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ctl("port-forward", ctl_box, f"{taken.getsockname()[1]}:80", status=1)
    assert "CANNOT_LISTEN" in ctl.err
