"""`sandboxctl` as a process against the real API of a fake host."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.common.background import Supervisor
from agent.common.errors import GuestError
from agent.daemon.rpc.server import ApiServer
from agent.daemon.rpc.services.sandbox_service import SandboxServicer
from guest.wire import Frame
from tests.support import leaks
from tests.support.daemon_fakes import Bench, SilentObserver, bench

STARTED = (
    Frame.EVENT,
    {
        "process": {
            "id": 7, "pid": 9, "argv": ["x"], "user": "sandbox", "cwd": "/", "start_ns": 1, "tty": False, "exit": None,
        },
        "dropped": 0,
    },
)  # fmt: skip
SMALL = ("--memory", "64MiB")


def exited(code: int | None = 0, signal_number: int = 0, name: str = "", *, oom: bool = False) -> Any:
    return Frame.RESULT, {"exit": {"code": code, "signal": signal_number, "signal_name": name, "oom": oom}}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while True:
            if condition():
                return
            await asyncio.sleep(0.02)


@dataclass
class Done:
    status: int
    out: bytes
    err: str

    def objects(self) -> list[dict[str, Any]]:
        """What --json printed: every line must be an object."""
        return [json.loads(line) for line in self.out.splitlines()]


@dataclass
class Ctl:
    """Runs `sandboxctl` against one socket."""

    socket: Path
    node: Bench

    async def start(self, *words: str, stdin: int = asyncio.subprocess.DEVNULL) -> asyncio.subprocess.Process:
        env = {name: value for name, value in os.environ.items() if not name.startswith("SANDBOXD_")}
        env["SANDBOXD_ADDRESS"] = f"unix:{self.socket}"
        pipe = asyncio.subprocess.PIPE
        argv = [sys.executable, "-m", "agent.cli.app", *words]
        return await asyncio.create_subprocess_exec(*argv, env=env, stdin=stdin, stdout=pipe, stderr=pipe)

    async def __call__(self, *words: str, stdin: bytes | None = None) -> Done:
        kind = asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE
        process = await self.start(*words, stdin=kind)
        out, err = await process.communicate(stdin)
        assert process.returncode is not None
        return Done(process.returncode, out, err.decode())

    async def create(self, *words: str) -> str:
        done = await self("create", *SMALL, *words)
        assert done.status == 0, done.err
        return done.out.decode().strip()


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short: unix sockets lie below it."""
    path = leaks.make_directory()
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def ctl(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ctl]:
    async with bench(directory, monkeypatch) as node:
        server = ApiServer(node.host.settings, node.sandboxes, node.supervisor)
        await server.start()
        yield Ctl(server.socket_path, node)
        await server.stop(0)


# -- sandboxes ---------------------------------------------------------------------------------------------------------


async def test_a_life_in_tables_and_json(ctl: Ctl) -> None:
    made = await ctl.create("--label", "a=b", "--lifetime", "1h", "--vcpus", "2", "-e", "K=V")
    table = (await ctl("ls")).out.decode().splitlines()
    assert table[0].split() == ["ID", "STATE", "IMAGE", "CPU", "MEMORY", "AGE", "EXPIRES", "LABELS"]
    assert table[1].split()[:5] == [made, "running", "minimal", "2", "64MiB"]
    assert table[1].endswith("a=b")
    (listed,) = (await ctl("ls", "--json", "--label", "a")).objects()
    assert (listed["id"], listed["state"], listed["labels"]) == (made, "running", {"a": "b"})
    assert (await ctl("ls", "--json", "--state", "failed")).out == b""
    assert (await ctl("ls", "--json", "--label", "a=c")).out == b""
    assert f"id                  {made}" in (await ctl("inspect", made)).out.decode()
    done = await ctl("--json", "update", made, "--no-expire", "--unlabel", "a", "--label", "c=d")
    assert (done.objects()[0]["expire_time"], done.objects()[0]["labels"]) == (None, {"c": "d"})
    done = await ctl("--json", "update", made, "--expire-in", "10m")
    assert done.objects()[0]["expire_time"] is not None
    assert (await ctl("rm", made)).out.decode().strip() == made
    assert ctl.node.left() == []


async def test_ls_goes_through_all_pages(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [await ctl.create() for _ in range(3)]
    whole = SandboxServicer.ListSandboxes

    async def one_each(self: Any, request: Any, context: Any) -> Any:
        request.page_size = 1
        return await whole(self, request, context)

    monkeypatch.setattr(SandboxServicer, "ListSandboxes", one_each)
    # Handlers are bound when the server is made.
    server = ApiServer(ctl.node.host.settings, ctl.node.sandboxes, Supervisor(SilentObserver()))
    ctl.socket.unlink()
    await server.start()
    listed = (await ctl("ls", "--json")).objects()
    assert [one["id"] for one in listed] == made
    assert (await ctl("rm", "--all")).status == 0
    await server.stop(0)


async def test_rm_goes_on_after_an_error(ctl: Ctl) -> None:
    made = await ctl.create()
    done = await ctl("rm", "sbx-0000000000000000", made)
    assert (done.status, done.out.decode().strip()) == (1, made)
    assert done.err.startswith("sandboxctl: ")
    assert done.err.endswith("(SANDBOX_NOT_FOUND)\n")
    done = await ctl("--json", "rm", "sbx-0000000000000000")
    assert (done.status, done.out) == (1, b"")
    assert json.loads(done.err)["error"]["reason"] == "SANDBOX_NOT_FOUND"


async def test_a_refused_create_says_why(ctl: Ctl) -> None:
    done = await ctl("create", "nosuch")
    assert (done.status, done.err) == (1, "sandboxctl: no image nosuch (IMAGE_NOT_FOUND)\n")
    done = await ctl("create", "--env", "K=\udcff")
    assert done.status == 2
    assert "NOT_UTF8" in done.err


async def test_a_lease_is_held_until_interrupted(ctl: Ctl) -> None:
    process = await ctl.start("create", *SMALL, "--lease", "1500ms")
    assert process.stdout is not None
    made = (await process.stdout.readline()).decode().strip()
    first = ctl.node.sandboxes.get(made).expire_time
    assert first is not None
    await until(lambda: (ctl.node.sandboxes.get(made).expire_time or 0) >= first + 1.5)
    process.send_signal(signal.SIGINT)
    await process.communicate()
    assert process.returncode == 130
    assert ctl.node.left() == []


async def test_an_interrupted_create_leaves_nothing(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def pass_through(phase: str) -> None:
        if phase == "configure":
            reached.set()
            await go_on.wait()

    monkeypatch.setattr(ctl.node.world, "pass_through", pass_through)
    process = await ctl.start("create", *SMALL)
    await reached.wait()
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert b"waiting for the sandbox" in await process.stderr.readline()
    go_on.set()
    await process.communicate()
    assert process.returncode == 130
    assert ctl.node.left() == []


# -- processes ---------------------------------------------------------------------------------------------------------


async def test_streams_stay_apart_and_are_not_changed(ctl: Ctl) -> None:
    made = await ctl.create()
    every_byte = bytes(range(256))
    ctl.node.world.script = [STARTED, (Frame.STDOUT, every_byte), (Frame.STDERR, b"e\n"), exited(3)]
    done = await ctl("exec", made, "x")
    assert (done.status, done.out, done.err) == (3, every_byte, "e\n")


@pytest.mark.parametrize(
    ("last", "status", "said"),
    [
        (exited(0), 0, ""),
        (exited(None, 15, "SIGTERM"), 143, ""),
        (exited(None, 9, "SIGKILL", oom=True), 137, "no memory left"),
        (GuestError("not found", reason="EXEC_NOT_FOUND"), 127, "(EXEC_NOT_FOUND)"),
        (GuestError("not executable", reason="EXEC_NOT_EXECUTABLE"), 126, "(EXEC_NOT_EXECUTABLE)"),
        (GuestError("no such directory", reason="CWD_INVALID"), 1, "(CWD_INVALID)"),
    ],
)
async def test_exec_ends_as_a_shell_would(ctl: Ctl, last: Any, status: int, said: str) -> None:
    made = await ctl.create()
    ctl.node.world.script = [last] if isinstance(last, Exception) else [STARTED, last]
    done = await ctl("exec", made, "--", "x")
    assert done.status == status
    assert said in done.err
    assert bool(done.err) is bool(said)


async def test_options_after_the_id_are_the_programs(ctl: Ctl) -> None:
    made = await ctl.create()
    ctl.node.world.script = [STARTED, exited()]
    assert (await ctl("exec", "-u", "root", "-w", "/", "-e", "A=B", made, "ls", "--json", "-t")).status == 0
    (call,) = [fields for op, fields in ctl.node.world.channels[0].calls if op == "proc.exec"]
    assert call["argv"] == ["ls", "--json", "-t"]
    assert (call["user"], call["cwd"], call["env"]) == ("root", "/", {"A": "B"})
    assert (call["tty"], call["stdin"]) == (None, "null")


async def test_stdin_is_passed_on_and_ended(ctl: Ctl) -> None:
    made = await ctl.create()
    ctl.node.world.script = [STARTED, 2, exited()]
    assert (await ctl("exec", "-i", made, "x", stdin=b"input")).status == 0
    assert ctl.node.world.streams[0].sent[:2] == [("DATA", b"input"), ("EOF", b"")]


async def test_exec_with_json_is_a_line_for_each_message(ctl: Ctl) -> None:
    made = await ctl.create()
    ctl.node.world.script = [STARTED, (Frame.STDOUT, b"\xff"), exited(4)]
    done = await ctl("exec", "--json", made, "x")
    assert done.status == 4
    assert [next(iter(one)) for one in done.objects()] == ["process", "stdout", "exit"]
    assert done.objects()[1] == {"stdout": "/w=="}


async def test_a_second_interrupt_gives_up(ctl: Ctl) -> None:
    made = await ctl.create()
    ctl.node.world.script = [STARTED, (Frame.STDOUT, b"up\n"), 100]
    process = await ctl.start("exec", made, "x")
    assert process.stdout is not None
    assert await process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    await until(lambda: any(op == "proc.signal" for op, _ in ctl.node.world.channels[0].calls))
    assert process.returncode is None
    process.send_signal(signal.SIGINT)
    await process.communicate()
    assert process.returncode == 130
    (sent,) = [fields for op, fields in ctl.node.world.channels[0].calls if op == "proc.signal"]
    assert (sent["id"], sent["signal"]) == (7, "SIGINT")


async def test_sigterm_ends_exec_as_sigterm(ctl: Ctl) -> None:
    made = await ctl.create()
    ctl.node.world.script = [STARTED, (Frame.STDOUT, b"up\n"), 100]
    process = await ctl.start("exec", made, "x")
    assert process.stdout is not None
    await process.stdout.readline()
    process.terminate()
    _, err = await process.communicate()
    assert (process.returncode, err) == (143, b"")


async def test_a_reader_that_leaves_ends_exec_quietly(ctl: Ctl) -> None:
    made = await ctl.create()
    ctl.node.world.script = [STARTED, *[(Frame.STDOUT, bytes(1 << 16))] * 64, exited()]
    process = await ctl.start("exec", made, "x")
    assert process.stdout is not None
    await process.stdout.readexactly(1)
    process.stdout._transport.close()  # type: ignore[attr-defined]
    assert process.stderr is not None
    err = await process.stderr.read()
    assert (await process.wait(), err) == (141, b"")


async def test_ps_shows_what_a_guest_says_without_its_escapes(ctl: Ctl) -> None:
    made = await ctl.create()
    process = {**STARTED[1]["process"], "argv": ["\x1b[2Jx\ny"]}  # type: ignore[dict-item]
    ctl.node.world.script = [(Frame.EVENT, {"processes": [process]}), (Frame.RESULT, {})]
    lines = (await ctl("ps", made)).out.decode().splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:3] == ["7", "9", "sandbox"]
    assert lines[1].endswith("\ufffd[2Jx\ufffdy")


# -- the node ----------------------------------------------------------------------------------------------------------


async def test_node_images_doctor_and_version(ctl: Ctl) -> None:
    assert "node (region local)" in (await ctl("node")).out.decode()
    (node,) = (await ctl("node", "--json")).objects()
    assert (node["state"], node["vmm"], node["sandboxes"]["total"]) == ("ready", "fake", 10)
    (image,) = (await ctl("image", "ls", "--json")).objects()
    assert (image["name"], image["size_bytes"]) == ("minimal", 3)
    assert (await ctl("image", "inspect", "none")).status == 1
    assert (await ctl("--json", "version")).objects()[0]["sandboxd"] == node["version"]
    (report,) = (await ctl("doctor", "--json")).objects()
    (daemon,) = [check for check in report["checks"] if check["name"] == "daemon"]
    assert (daemon["status"], str(ctl.socket) in daemon["detail"]) == ("ok", True)


async def test_node_and_doctor_name_a_loop_that_fails(ctl: Ctl) -> None:
    async def fail() -> None:
        raise RuntimeError("can't start new thread")

    ctl.node.supervisor.start("drop-counters", fail)
    await asyncio.sleep(0)
    sentence = "background loop drop-counters fails and is restarted: RuntimeError: can't start new thread"
    assert f"degraded  {sentence}" in (await ctl("node")).out.decode()
    (report,) = (await ctl("doctor", "--json")).objects()
    (found,) = [check for check in report["checks"] if check["name"] == "degraded"]
    assert (found["status"], found["detail"]) == ("warn", sentence)


async def test_node_watch_prints_a_line_on_a_change(ctl: Ctl) -> None:
    process = await ctl.start("--json", "node", "--watch")
    assert process.stdout is not None
    assert json.loads(await process.stdout.readline())["sandboxes"]["used"] == 0
    await ctl.create()
    async with asyncio.timeout(10):
        while json.loads(await process.stdout.readline())["sandboxes"]["used"] != 1:
            pass
    process.send_signal(signal.SIGINT)
    await process.communicate()
    assert process.returncode == 130


async def test_image_build_of_an_unknown_image_fails(ctl: Ctl) -> None:
    done = await ctl("image", "build", "no-such-flavour")
    assert (done.status, done.out) == (2, b"")
    assert "no-such-flavour" in done.err


async def test_the_console_is_passed_on_as_it_is(ctl: Ctl) -> None:
    made = await ctl.create()
    done = await ctl("logs", "--tail", "10", made)
    assert done.out == b"Kernel panic - not syncing\x1b[0m\n"[-10:]
    assert (await ctl("logs", "--tail", "0", made)).out == b""
