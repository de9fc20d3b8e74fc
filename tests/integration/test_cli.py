"""`sandboxctl` as its users run it, against a real daemon and a real sandbox."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Daemon

pytestmark = pytest.mark.vm

TIMEOUT_S = 60.0
MIB = 1 << 20


@dataclass
class Ctl:
    """Runs `sandboxctl` with the settings of the session's daemon."""

    env: dict[str, str]

    @staticmethod
    def argv(*words: str) -> list[str]:
        return [sys.executable, "-m", "agent.cli.main", *words]

    def __call__(self, *words: str, status: int = 0, stdin: bytes = b"") -> bytes:
        done = subprocess.run(
            self.argv(*words), env=self.env, input=stdin, capture_output=True, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == status, (words, done.returncode, done.stdout[-500:], done.stderr[-2000:])
        self.err = done.stderr.decode()
        return done.stdout

    def objects(self, *words: str) -> list[dict[str, Any]]:
        """What --json prints: nothing but an object a line."""
        return [json.loads(line) for line in self("--json", *words).splitlines()]

    def start(self, *words: str, **streams: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.argv(*words), env=self.env, **streams)


@pytest.fixture(scope="module")
def ctl(daemon: Daemon) -> Ctl:
    return Ctl(daemon.env)


@pytest.fixture(scope="module")
def box(ctl: Ctl) -> Iterator[str]:
    """One sandbox for the module, by `create` and `rm`."""
    made = ctl("create", "--memory", "256MiB", "--label", "test=cli", "-e", "GREETING=hello").decode().strip()
    yield made
    assert ctl("rm", made).decode().strip() == made


# -- sandboxes and the node --------------------------------------------------------------------------------------------


def test_ls_and_inspect(ctl: Ctl, box: str) -> None:
    assert any(line.startswith(f"{box}  running") for line in ctl("ls").decode().splitlines())
    (listed,) = ctl.objects("ls", "--label", "test=cli", "--state", "running")
    (inspected,) = ctl.objects("inspect", box)
    assert listed == inspected
    assert (listed["id"], listed["memory_bytes"], listed["vmm"].partition(" ")[0]) == (box, 256 * MIB, "qemu")
    assert "guest.configure" in ctl("inspect", box).decode()
    ctl("inspect", "sbx-0000000000000000", status=1)
    assert ctl.err.endswith("(SANDBOX_NOT_FOUND)\n")


def test_create_use_and_rm_with_json(ctl: Ctl) -> None:
    (made,) = ctl.objects("create", "--memory", "192MiB", "--lifetime", "10m")
    assert (made["state"], made["memory_bytes"]) == ("running", 192 * MIB)
    assert made["expire_time"] is not None
    assert ctl.objects("update", made["id"], "--no-expire")[0]["expire_time"] is None
    assert ctl.objects("rm", made["id"]) == [{"id": made["id"], "deleted": True}]
    ctl("rm", made["id"], status=1)


def test_node_images_and_version(ctl: Ctl, box: str) -> None:
    (node,) = ctl.objects("node")
    assert (node["state"], node["vmm"]) == ("ready", "qemu")
    assert node["sandboxes"]["allocated"] >= 1
    assert "ALLOCATABLE" in ctl("node").decode()
    assert "minimal" in [image["name"] for image in ctl.objects("image", "ls")]
    (image,) = ctl.objects("image", "inspect", "minimal")
    assert any(package.startswith("bash=") for package in image["packages"])
    ctl("image", "rm", "minimal", status=1)
    assert "IMAGE_IN_USE" in ctl.err
    (version,) = ctl.objects("version")
    assert version["sandboxctl"] == version["sandboxd"]


def test_doctor_finds_all_that_these_tests_need(ctl: Ctl) -> None:
    (report,) = ctl.objects("doctor", "--probe")
    checks = {check["name"]: check for check in report["checks"]}
    assert report["ok"] is True
    assert {checks[name]["status"] for name in ("root", "tun", "qemu", "mkfs.ext4", "image minimal", "daemon")} == {
        "ok"
    }
    (node,) = ctl.objects("node")
    used = f"{node['vmm']} {node['vmm_version']} ({node['accelerator']}): "
    assert checks["vmm"]["detail"] == used + node["vmm_reason"]


def test_top_once(ctl: Ctl, box: str) -> None:
    busy = ctl.start("exec", box, "sh", "-c", "while :; do :; done", stdin=subprocess.DEVNULL)
    try:
        (seen,) = ctl.objects("top", "--once", "--interval", "1s", box)
        assert seen["id"] == box
        assert 0 < seen["memory_available_bytes"] < seen["memory_total_bytes"] <= 256 * MIB * 1.05
        assert seen["vmm_pss_bytes"] > 32 * MIB
        assert 5 < seen["cpu_percent"] < 400
    finally:
        busy.send_signal(signal.SIGINT)
        assert busy.wait(TIMEOUT_S) == 130
    assert re.search(rf"^{box} +\d+ ", ctl("top", "--once", "--interval", "200ms").decode(), re.MULTILINE)


def test_logs(ctl: Ctl, box: str) -> None:
    whole = ctl("logs", box)
    assert b"sandboxd-init" in whole
    assert ctl("logs", "--tail", "20", box) == whole[-20:]
    pieces = ctl.objects("logs", box)
    assert all(set(piece) == {"data"} for piece in pieces)


# -- exec --------------------------------------------------------------------------------------------------------------


def test_exec_passes_streams_environment_and_status(ctl: Ctl, box: str) -> None:
    script = 'echo "$GREETING $MORE $PWD $(id -un)"; echo oops >&2; exit 7'
    out = ctl("exec", "-u", "root", "-w", "/etc", "-e", "MORE=more", box, "--", "sh", "-c", script, status=7)
    assert (out, ctl.err) == (b"hello more /etc root\n", "oops\n")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 42"], 42),
        (["sh", "-c", "kill -TERM $$"], 143),
        (["no-such-program"], 127),
        (["/etc/passwd"], 126),
    ],
)
def test_exit_codes(ctl: Ctl, box: str, words: list[str], status: int) -> None:
    assert ctl("exec", box, *words, status=status) == b""


def test_stdin_is_binary_safe_and_ends(ctl: Ctl, box: str) -> None:
    data = os.urandom(3 * MIB + 1)
    assert ctl("exec", "-i", box, "cat", stdin=data) == data
    assert ctl("exec", box, "cat", stdin=b"not passed on") == b""


def test_output_is_not_hoarded_for_a_slow_reader(ctl: Ctl, box: str) -> None:
    reading = ctl.start("exec", box, "sh", "-c", "head -c 67108864 /dev/zero", stdout=subprocess.PIPE)
    assert reading.stdout is not None
    with reading:
        assert len(os.read(reading.stdout.fileno(), 1)) == 1
        before = _rss(reading.pid)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            assert _rss(reading.pid) < before + 48 * MIB
            time.sleep(0.1)
        reading.stdout.close()
        assert reading.wait(TIMEOUT_S) == 141


def _rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_interrupt_goes_to_the_program(ctl: Ctl, box: str) -> None:
    script = 'trap "echo caught; exit 5" INT; echo up; while :; do sleep 0.1; done'
    running = ctl.start("exec", box, "bash", "-c", script, stdout=subprocess.PIPE)
    assert running.stdout is not None
    with running:
        assert running.stdout.readline() == b"up\n"
        running.send_signal(signal.SIGINT)
        assert running.stdout.readline() == b"caught\n"
        assert running.wait(TIMEOUT_S) == 5


def test_detached_processes(ctl: Ctl, box: str) -> None:
    number = ctl("exec", "-d", box, "--", "sh", "-c", "echo kept; sleep 1000").decode().strip()
    (process,) = [one for one in ctl.objects("ps", box) if one["process_id"] == int(number)]
    assert process["exit"] is None
    assert re.search(rf"^{number} .* running ", ctl("ps", box).decode(), re.MULTILINE)
    assert any(one["command"] == "sleep 1000" for one in ctl.objects("ps", "--all", box))
    attached = ctl.start("attach", box, number, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert attached.stdout is not None
    with attached:
        assert attached.stdout.readline() == b"kept\n"
        ctl("kill", box, number, "-s", "KILL")
        assert attached.wait(TIMEOUT_S) == 137
    ctl("wait", box, number, status=137)
    ctl("kill", box, number, status=1)
    assert "PROCESS_EXITED" in ctl.err


# -- a terminal --------------------------------------------------------------------------------------------------------


class Terminal:
    """Our side of a pseudo-terminal on which `sandboxctl` runs."""

    def __init__(self, ctl: Ctl, *words: str, rows: int = 24, cols: int = 80) -> None:
        self.master, self.slave = pty.openpty()
        self.set_size(rows, cols)
        self.before = termios.tcgetattr(self.slave)
        ends = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave}
        self.process = ctl.start(*words, start_new_session=True, **ends)
        self.seen = b""

    def set_size(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, cols, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def expect(self, pattern: bytes, timeout_s: float = TIMEOUT_S) -> re.Match[bytes]:
        """Returns the match, once it is on the screen, and forgets all up to it."""
        deadline = time.monotonic() + timeout_s
        while (match := re.search(pattern, self.seen)) is None:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, (pattern, self.seen)
            self.seen += os.read(self.master, 65536)
        self.seen = self.seen[match.end() :]
        return match

    def end(self) -> int:
        """Returns the exit status."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.05)[0]:
                self.seen += os.read(self.master, 65536)
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@contextmanager
def terminal(ctl: Ctl, *words: str, **size: int) -> Iterator[Terminal]:
    opened = Terminal(ctl, *words, **size)
    try:
        yield opened
    finally:
        opened.close()


def test_a_shell_on_a_terminal(ctl: Ctl, box: str) -> None:
    with terminal(ctl, "exec", "-it", "-e", "PS1=ready> ", box, "bash", "--norc", rows=33, cols=101) as screen:
        screen.expect(rb"ready> $")
        assert termios.tcgetattr(screen.slave) != screen.before
        screen.type(b"stty size; tty\r")
        screen.expect(rb"33 101\r\n/dev/pts/\d+\r\n")
        screen.set_size(44, 120)
        screen.process.send_signal(signal.SIGWINCH)
        # The shell learns of it by a call of its own, maybe after the next line, and draws its line again then.
        screen.type(b'until [ "$(stty size)" = "44 120" ]; do sleep 0.1; done; echo "now" is $(stty size)\r')
        screen.expect(rb"now is 44 120\r\n")
        # What the job itself prints says that it, and not the shell, has the terminal now.
        screen.type(b"sh -c 'echo sl\"\"eeps; exec sleep 100'\r")
        screen.expect(rb"sleeps\r\n")
        screen.type(b"\x03")
        screen.expect(rb"\^C")
        screen.expect(rb"ready> $")
        screen.type(b"echo li''ves\r")
        screen.expect(rb"lives\r\n")
        screen.type(b"exit 3\r")
        assert screen.end() == 3
        assert termios.tcgetattr(screen.slave) == screen.before


def test_a_terminal_is_restored_when_the_command_is_ended(ctl: Ctl, box: str) -> None:
    with terminal(ctl, "exec", "-it", box, "sh", "-c", "echo up; sleep 100") as screen:
        screen.expect(rb"up\r\n")
        assert termios.tcgetattr(screen.slave) != screen.before
        screen.process.terminate()
        assert screen.end() == 143
        assert termios.tcgetattr(screen.slave) == screen.before


def test_a_program_that_cannot_start_leaves_the_terminal_alone(ctl: Ctl, box: str) -> None:
    with terminal(ctl, "exec", "-it", box, "no-such-program") as screen:
        assert screen.end() == 127
        assert termios.tcgetattr(screen.slave) == screen.before


def test_attach_to_a_terminal_and_leave_it(ctl: Ctl, box: str) -> None:
    number = ctl("exec", "-dt", "-e", "PS1=ready> ", box, "bash", "--norc").decode().strip()
    with terminal(ctl, "attach", box, number, rows=50, cols=90) as screen:
        screen.expect(rb"ready> $")
        screen.type(b'until [ "$(stty size)" = "50 90" ]; do sleep 0.1; done; echo "now" is $(stty size)\r')
        screen.expect(rb"now is 50 90\r\n")
        screen.type(b"\x1d")
        assert screen.end() == 0
        assert termios.tcgetattr(screen.slave) == screen.before
    (process,) = [one for one in ctl.objects("ps", box) if one["process_id"] == int(number)]
    assert (process["terminal"], process["exit"]) == (True, None)
    ctl("kill", box, number, "--signal", "9")
    ctl("wait", box, number, status=137)


def test_logs_on_a_terminal_have_no_escapes(ctl: Ctl, box: str) -> None:
    ctl("exec", "-u", "root", box, "sh", "-c", r"printf '\033]0;title\007marker\n' >/dev/console")
    assert b"\x1b]0;title\x07marker" in ctl("logs", box)
    with terminal(ctl, "logs", box) as screen:
        assert screen.end() == 0
        assert b"]0;titlemarker\r\n" in screen.seen
        assert b"\x1b" not in screen.seen


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


def test_a_tree_goes_there_and_back_unchanged(ctl: Ctl, box: str, tmp_path: Path) -> None:
    _plant(tmp_path / "tree")
    (report,) = ctl.objects("cp", str(tmp_path / "tree"), f"{box}:copied")
    assert (report["files"], report["folders"], report["links"]) == (7, 6, 4)
    assert report["bytes"] > 20 * MIB
    listed = ctl("exec", "-u", "root", box, "find", "/home/sandbox/copied", "-name", "private", "-printf", "%m %T@ %u")
    assert listed == b"600 1000000000.1234567890 root"
    ctl("cp", f"{box}:/home/sandbox/copied", str(tmp_path / "back"))
    assert _facts(tmp_path / "back") == _facts(tmp_path / "tree")
    # Again, over what is there: into the folder, as cp does, and with the contents alone.
    ctl("cp", f"{box}:copied", str(tmp_path / "back"))
    assert _facts(tmp_path / "back" / "copied") == _facts(tmp_path / "tree")
    ctl("cp", f"{tmp_path}/tree/deep/er/.", f"{box}:copied/empty")
    assert ctl("exec", box, "cat", "copied/empty/still/file") == b"deep\n"
    ctl("exec", "-u", "root", box, "rm", "-r", "/home/sandbox/copied")


def test_single_files_and_streams(ctl: Ctl, box: str, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    ctl("cp", "-", f"{box}:/tmp/stream", stdin=data)
    assert ctl("cp", f"{box}:/tmp/stream", "-") == data
    ctl("cp", f"{box}:/tmp/stream", str(tmp_path))
    assert (tmp_path / "stream").read_bytes() == data
    odd = os.fsdecode(b"\xff")
    (tmp_path / odd).write_bytes(b"odd")
    ctl("cp", f"{tmp_path}/{odd}", f"{box}:/tmp")
    ctl("cp", f"{box}:/tmp/{odd}", f"{tmp_path}/again")
    assert (tmp_path / "again").read_bytes() == b"odd"
    ctl("exec", box, "ln", "-s", "/tmp/stream", "way")
    ctl("cp", f"{box}:way", str(tmp_path))
    assert (tmp_path / "way").readlink() == Path("/tmp/stream")
    ctl("cp", "-L", f"{box}:way", str(tmp_path / "followed"))
    assert (tmp_path / "followed").read_bytes() == data


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["{box}:/none", "{here}/x"], "ENOENT"),
        (["{box}:/etc/passwd", "{here}/none/x"], "ENOENT"),
        (["{here}/none", "{box}:/tmp"], "OS_ERROR"),
        (["{here}/file", "{box}:/none/x"], "NOT_FOUND"),
        (["{here}", "{box}:/etc/passwd"], "NOT_A_FOLDER"),
        (["sbx-0000000000000000:/x", "{here}/x"], "SANDBOX_NOT_FOUND"),
    ],
)
def test_copies_that_cannot_be(ctl: Ctl, box: str, tmp_path: Path, words: list[str], reason: str) -> None:
    (tmp_path / "file").touch()
    ctl("cp", *(word.format(box=box, here=tmp_path) for word in words), status=1)
    assert f"({reason})" in ctl.err or (reason == "NOT_FOUND" and "(ENOENT)" in ctl.err)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_devices_are_left_out(ctl: Ctl, box: str, tmp_path: Path) -> None:
    ctl("exec", box, "sh", "-c", "mkdir /tmp/special; mkfifo /tmp/special/pipe; echo x >/tmp/special/file")
    ctl("cp", f"{box}:/tmp/special", str(tmp_path), status=1)
    assert "left out /tmp/special/pipe" in ctl.err
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


def test_port_forward(ctl: Ctl, box: str) -> None:
    server = ctl.start("exec", box, "python3", "-c", _ECHO, stdout=subprocess.PIPE)
    assert server.stdout is not None
    with server:
        assert server.stdout.readline() == b"up\n"
        with forwarded(ctl, box, ":9000") as address:
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
        with forwarded(ctl, box, "0:9001") as address, socket.create_connection(address, TIMEOUT_S) as connection:
            # The server ends first, while the client's side stays open.
            assert _read_all([connection]) == [b"bye"]
        server.send_signal(signal.SIGINT)
        assert server.wait(TIMEOUT_S) == 130


def test_a_port_that_nobody_listens_on(ctl: Ctl, box: str) -> None:
    with forwarded(ctl, box, ":9999") as address, pytest.raises(ConnectionResetError):
        _exchange(address, b"x")
    ctl("port-forward", "sbx-0000000000000000", "80", status=1)
    assert "SANDBOX_NOT_FOUND" in ctl.err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ctl("port-forward", box, f"{taken.getsockname()[1]}:80", status=1)
    assert "CANNOT_LISTEN" in ctl.err
