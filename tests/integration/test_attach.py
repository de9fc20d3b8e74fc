"""Clients that come and go while a process runs: attach, replay, terminals, hang-up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from sandboxd.v1 import process_pb2 as pb
from sandboxd.v1 import sandbox_pb2
from tests.support.client import MIB, Client
from tests.support.daemon import refused, until

pytestmark = pytest.mark.vm

PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


class Session:
    """One Exec or Attach call that a test drives message by message."""

    def __init__(self, client: Client, sandbox_id: str) -> None:
        self._client = client
        self._sandbox_id = sandbox_id
        self._requests: asyncio.Queue[Any] = asyncio.Queue()
        self.output = bytearray()
        self.process: pb.Process | None = None
        self.dropped = 0
        self.exit: pb.Exit | None = None
        self.kind: Any = pb.ExecRequest
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None

    def exec(self, *argv: str, detach: bool = False, **fields: Any) -> Session:
        spec = pb.ProcessSpec(argv=argv, **fields)
        start = pb.ExecRequest.Start(sandbox_id=self._sandbox_id, spec=spec, detach_on_disconnect=detach)
        self._requests.put_nowait(pb.ExecRequest(start=start))
        self._call = self._client.processes.Exec(self._messages())
        self._reader = asyncio.create_task(self._read())
        return self

    def attach(self, process_id: int, **fields: Any) -> Session:
        self.kind = pb.AttachRequest
        opened = pb.AttachRequest.Open(sandbox_id=self._sandbox_id, process_id=process_id, **fields)
        self._requests.put_nowait(pb.AttachRequest(open=opened))
        self._call = self._client.processes.Attach(self._messages())
        self._reader = asyncio.create_task(self._read())
        return self

    async def _messages(self) -> AsyncIterator[Any]:
        while (request := await self._requests.get()) is not None:
            yield request

    async def _read(self) -> None:
        async for response in self._call:
            self.output += response.stdout + response.stderr
            if response.HasField("process"):
                self.process = response.process
                self.dropped = getattr(response, "dropped_bytes", 0)
            if response.HasField("exit"):
                self.exit = response.exit

    def send(self, **fields: Any) -> None:
        self._requests.put_nowait(self.kind(**fields))

    async def shows(self, text: bytes) -> None:
        """Waits for output."""

        async def has() -> bool:
            return text in self.output

        await until(has)

    async def started(self) -> pb.Process:
        async def has() -> bool:
            return self.process is not None

        await until(has)
        assert self.process is not None
        return self.process

    async def ended(self) -> pb.Exit:
        assert self._reader is not None
        async with asyncio.timeout(10):
            await self._reader
        assert self.exit is not None
        return self.exit

    async def leave(self) -> None:
        assert self._reader is not None
        self._call.cancel()
        await asyncio.wait({self._reader})


async def start(client: Client, sandbox_id: str, *argv: str, **fields: Any) -> int:
    spec = pb.ProcessSpec(argv=argv, **fields)
    request = pb.StartProcessRequest(sandbox_id=sandbox_id, spec=spec)
    return int((await client.processes.StartProcess(request)).process_id)


async def runs(client: Client, sandbox_id: str, pid: int) -> bool:
    request = pb.ListProcessesRequest(sandbox_id=sandbox_id, all_processes=True)
    return pid in [found.pid for found in (await client.processes.ListProcesses(request)).system_processes]


async def test_input_is_interactive_and_ends_by_message_or_by_stream(
    client: Client, sandbox: sandbox_pb2.Sandbox
) -> None:
    session = Session(client, sandbox.id).exec("cat", stdin=pb.ProcessSpec.STDIN_PIPE)
    for line in (b"one\n", b"two\n"):
        session.send(stdin=line)
        await session.shows(line)
    session.send(stdin_eof=True)
    assert await session.ended() == pb.Exit(exit_code=0)
    assert session.output == b"one\ntwo\n"
    # A signal within the stream.
    session = Session(client, sandbox.id).exec("sleep", "60")
    await session.started()
    session.send(signal="SIGINT")
    assert (await session.ended()).signal == "SIGINT"


async def test_a_terminal_has_a_size_that_changes(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    terminal = pb.Terminal(rows=33, cols=101, term="vt100")
    shell = Session(client, sandbox.id).exec("bash", "--norc", "-i", terminal=terminal)
    process = await shell.started()
    assert process.terminal
    shell.send(stdin=b"stty size; echo is $TERM; tty\n")
    for text in (b"33 101\r\n", b"is vt100\r\n", b"/dev/pts/"):
        await shell.shows(text)
    shell.send(resize=pb.Terminal(rows=50, cols=20))
    shell.send(stdin=b"stty size\n")
    await shell.shows(b"50 20\r\n")
    request = pb.ResizeTerminalRequest(
        sandbox_id=sandbox.id, process_id=process.process_id, size=pb.Terminal(rows=7, cols=8)
    )
    await client.processes.ResizeTerminal(request)
    shell.send(stdin=b"stty size\n")
    await shell.shows(b"7 8\r\n")
    # ^C ends what runs in the foreground, not the shell.
    # The shell's echo of the line comes before its program runs: words that only the program says tell that it does.
    shell.send(stdin=b"sh -c 'echo in $((1 + 1)); exec sleep 60'\n")
    await shell.shows(b"in 2\r\n")
    shell.send(stdin=b"\x03")
    shell.send(stdin=b"echo after; exit 4\n")
    assert (await shell.ended()).exit_code == 4
    with refused(grpc.StatusCode.NOT_FOUND, "NOT_FOUND"):
        await client.processes.ResizeTerminal(request)  # an Exec that ended is forgotten
    plain = await start(client, sandbox.id, "sleep", "60")
    request.process_id = plain
    with refused(PRECONDITION, "NO_TERMINAL"):
        await client.processes.ResizeTerminal(request)
    request.size.rows = 70_000
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC"):
        await client.processes.ResizeTerminal(request)
    await client.processes.SendSignal(pb.SendSignalRequest(sandbox_id=sandbox.id, process_id=plain, signal="KILL"))


async def test_two_clients_see_all_of_it_and_leaving_does_not_end_it(
    client: Client, sandbox: sandbox_pb2.Sandbox
) -> None:
    number = await start(
        client, sandbox.id, "sh", "-c", "echo early; while read line; do echo got $line; done; exit 6",
        stdin=pb.ProcessSpec.STDIN_PIPE,
    )  # fmt: skip
    first, second, late = (Session(client, sandbox.id) for _ in range(3))
    first.attach(number)
    second.attach(number)
    for session in (first, second):
        await session.shows(b"early\n")
    first.send(stdin=b"a\n")
    for session in (first, second):
        await session.shows(b"got a\n")
    await first.leave()
    onlooker = pb.AttachRequest(open=pb.AttachRequest.Open(sandbox_id=sandbox.id, process_id=number))
    watching = aiter(client.processes.Attach(iter([onlooker])))  # its own stream ends with its first message
    assert (await anext(watching)).process.process_id == number
    second.send(stdin=b"b\n")
    await second.shows(b"got b\n")
    late.attach(number, no_replay=True)
    await late.started()
    second.send(stdin=b"c\n")
    await late.shows(b"got c\n")
    assert late.output == b"got c\n"
    second.send(stdin_eof=True)
    for session in (second, late):
        assert (await session.ended()).exit_code == 6
    assert [response.exit.exit_code async for response in watching][-1] == 6
    # Who comes after the end gets all of it, too.
    after = Session(client, sandbox.id).attach(number)
    assert (await after.ended()).exit_code == 6
    assert after.output == second.output == b"early\ngot a\ngot b\ngot c\n"
    assert (await after.started()).exit.exit_code == 6


async def test_a_process_nobody_looks_at_goes_on_and_keeps_its_last_output(
    client: Client, sandbox: sandbox_pb2.Sandbox
) -> None:
    size, kept = 3 * MIB, MIB
    script = f"head -c {size} /dev/zero | tr '\\0' x; printf THE_END"
    number = await start(client, sandbox.id, "sh", "-c", script, replay_bytes=kept)
    waited = await client.processes.Wait(pb.WaitRequest(sandbox_id=sandbox.id, process_id=number))
    assert waited.exit.exit_code == 0
    session = Session(client, sandbox.id).attach(number)
    await session.ended()
    assert session.output.endswith(b"xTHE_END")
    assert kept // 2 < len(session.output) <= kept
    assert session.dropped + len(session.output) == size + len(b"THE_END")


async def test_an_exec_ends_with_its_client_unless_it_is_detached(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    obedient = Session(client, sandbox.id).exec("sleep", "300")
    stubborn = Session(client, sandbox.id).exec("sh", "-c", "trap '' HUP; while :; do sleep 0.2; done")
    detached = Session(client, sandbox.id).exec(
        "sh", "-c", "read number; exit $number", detach=True, stdin=pb.ProcessSpec.STDIN_PIPE
    )
    pids = [(await session.started()).pid for session in (obedient, stubborn, detached)]
    for session in (obedient, stubborn, detached):
        await session.leave()

    async def gone(pid: int) -> bool:
        return not await runs(client, sandbox.id, pid)

    await until(lambda: gone(pids[0]), timeout_s=1.5)  # by SIGHUP
    assert not await gone(pids[1])
    await until(lambda: gone(pids[1]), timeout_s=5)  # by SIGKILL, after its grace
    # What is detached still has its input: the next client types the answer.
    again = Session(client, sandbox.id).attach((await detached.started()).process_id)
    await again.started()
    again.send(stdin=b"8\n")
    assert await again.ended() == pb.Exit(exit_code=8)


async def test_a_list_tells_running_from_exited(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    running = await start(client, sandbox.id, "sleep", "300", user="root", cwd="/usr")
    exited = await start(client, sandbox.id, "sh", "-c", "exit 2")
    await client.processes.Wait(pb.WaitRequest(sandbox_id=sandbox.id, process_id=exited))
    listing = await client.processes.ListProcesses(pb.ListProcessesRequest(sandbox_id=sandbox.id))
    assert not listing.system_processes
    numbers = [process.process_id for process in listing.processes]
    assert numbers == sorted(numbers)
    found = {process.process_id: process for process in listing.processes}
    one = found[running]
    assert (list(one.argv), one.user, one.cwd, one.HasField("exit")) == (["sleep", "300"], "root", "/usr", False)
    assert found[exited].exit == pb.Exit(exit_code=2)
    await client.processes.SendSignal(pb.SendSignalRequest(sandbox_id=sandbox.id, process_id=running, signal="9"))
    await client.processes.Wait(pb.WaitRequest(sandbox_id=sandbox.id, process_id=running))
