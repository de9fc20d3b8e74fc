"""Processes: how they are started, what they are given, how their end is told."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import grpc
import pytest

from sandboxd.v1 import process_pb2 as pb
from sandboxd.v1 import sandbox_pb2
from tests.support.client import MIB, Client, Result
from tests.support.daemon import refused, until

pytestmark = pytest.mark.vm

PRECONDITION, INVALID = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT
EXHAUST = """
import resource
blocks = []
while True:
    blocks.append(bytearray(b"x" * (4 << 20)))
"""
ORPHANS = """
import os
for _ in range(200):
    if os.fork() == 0:
        if os.fork() == 0:
            os._exit(0)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def sandbox_fields() -> dict[str, Any]:
    return {"memory_bytes": 192 * MIB, "env": {"OF_SANDBOX": "1", "BOTH": "sandbox"}}


async def start(client: Client, sandbox_id: str, *argv: str, **fields: Any) -> pb.Process:
    spec = pb.ProcessSpec(argv=argv, **fields)
    started: pb.Process = await client.processes.StartProcess(pb.StartProcessRequest(sandbox_id=sandbox_id, spec=spec))
    return started


async def wait(client: Client, sandbox_id: str, process_id: int) -> pb.Exit:
    return (await client.processes.Wait(pb.WaitRequest(sandbox_id=sandbox_id, process_id=process_id))).exit


async def send(client: Client, sandbox_id: str, process_id: int, name: str) -> None:
    request = pb.SendSignalRequest(sandbox_id=sandbox_id, process_id=process_id, signal=name)
    await client.processes.SendSignal(request)


async def table(client: Client, sandbox_id: str) -> list[pb.SystemProcess]:
    request = pb.ListProcessesRequest(sandbox_id=sandbox_id, all_processes=True)
    return list((await client.processes.ListProcesses(request)).system_processes)


async def test_arguments_environment_directory_and_user(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    async def sh(script: str, **fields: Any) -> list[str]:
        result = await client.run(sandbox.id, "sh", "-c", script, **fields)
        assert (result.code, result.stderr) == (0, b"")
        return result.stdout.decode().splitlines()

    words = ["", "a b", "ü\n", "$HOME", "*", "-"]
    result = await client.run(sandbox.id, "python3", "-c", "import sys; print(ascii(sys.argv[1:]))", *words)
    assert result.stdout.decode().strip() == ascii(words)
    assert await sh("echo $OF_SANDBOX $BOTH $OWN", env={"BOTH": "process", "OWN": "é"}) == ["1 process é"]
    assert await sh("id -u; id -g; pwd; echo $HOME $USER") == ["1000", "1000", "/home/sandbox", "/home/sandbox sandbox"]
    assert await sh("id -u; id -G; pwd; echo $HOME", user="root") == ["0", "0", "/root", "/root"]
    assert await sh("id -u; id -g; pwd", user="4321") == ["4321", "4321", "/"]
    assert await sh("id -un; pwd", user="1000", cwd="/usr/lib") == ["sandbox", "/usr/lib"]
    assert await sh("sudo -n id -u") == ["0"]
    assert await sh("echo $PATH", env={"PATH": "/usr/bin:/bin"}) == ["/usr/bin:/bin"]
    # Nothing of root stays in what runs for a user.
    status = "\n".join(await sh("cat /proc/self/status"))
    assert "Uid:\t1000\t1000\t1000\t1000" in status
    assert "CapEff:\t0000000000000000" in status
    assert "SigBlk:\t0000000000000000" in status
    assert "SigIgn:\t0000000000000000" in status
    assert await sh("ls /proc/self/fd") == ["0", "1", "2", "3"]  # 3 is ls's own
    assert await sh("ulimit -c; readlink /proc/self/fd/0") == ["0", "/dev/null"]


async def test_streams_stay_apart_and_input_ends(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    both = "cat; echo out; echo err >&2; exit 3"
    result = await client.run(sandbox.id, "sh", "-c", both, stdin=b"in\n\0\xff")
    assert result == Result(b"in\n\0\xffout\n", b"err\n", pb.Exit(exit_code=3))
    # Input for a program that does not read it does no harm.
    assert (await client.run(sandbox.id, "true", stdin=bytes(4 * MIB))).code == 0
    # A program that closes its outputs still has an exit.
    assert (await client.run(sandbox.id, "sh", "-c", "exec >&- 2>&-; sleep 0.2; exit 5")).code == 5
    # A child that keeps the outputs does not keep the call.
    async with asyncio.timeout(5):
        assert (await client.run(sandbox.id, "sh", "-c", "echo x; sleep 30 & exit 0")).stdout == b"x\n"
    await client.run(sandbox.id, "sh", "-c", "kill $(pidof sleep); true", user="root")


async def test_exit_codes_and_signals(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    for code in (0, 1, 127, 255):
        assert (await client.run(sandbox.id, "sh", "-c", f"exit {code}")).exit == pb.Exit(exit_code=code)
    for name in ("SIGTERM", "SIGKILL", "SIGHUP", "SIGUSR1", "SIGSEGV"):
        process = await start(client, sandbox.id, "sleep", "60")
        await send(client, sandbox.id, process.process_id, name if name != "SIGHUP" else "HUP")
        number = signal.Signals[name].value
        assert await wait(client, sandbox.id, process.process_id) == pb.Exit(signal=name, signal_number=number)
        for spelled in (name, str(number)):
            with refused(PRECONDITION, "PROCESS_EXITED"):
                await send(client, sandbox.id, process.process_id, spelled)
    for wrong in ("SIGNOTHING", "", "0", "65", "-1", "9" * 1000):
        with refused(INVALID, "INVALID_SPEC"):
            await send(client, sandbox.id, process.process_id, wrong)
    with refused(grpc.StatusCode.NOT_FOUND, "NOT_FOUND"):
        await wait(client, sandbox.id, 1 << 40)
    # The whole group gets the signal.
    process = await start(client, sandbox.id, "sh", "-c", "sleep 987 & sleep 987; true")

    async def has_sleepers(wanted: int) -> bool:
        return sum(found.command == "sleep 987" for found in await table(client, sandbox.id)) == wanted

    await until(lambda: has_sleepers(2))
    await send(client, sandbox.id, process.process_id, "KILL")
    await until(lambda: has_sleepers(0))


async def test_a_thousand_processes_each_with_its_own_end(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    room = asyncio.Semaphore(200)

    async def one(number: int) -> tuple[int, Result]:
        script = f"echo {number}; " + ("kill -KILL $$" if number % 10 == 9 else f"exit {number % 256}")
        async with room:
            return number, await client.run(sandbox.id, "sh", "-c", script)

    async with asyncio.timeout(100):
        results = await asyncio.gather(*(one(number) for number in range(1000)))
    killed = pb.Exit(signal="SIGKILL", signal_number=9)
    for number, result in results:
        wanted = killed if number % 10 == 9 else pb.Exit(exit_code=number % 256)
        assert result == Result(f"{number}\n".encode(), b"", wanted)


async def test_orphans_are_reaped(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    assert (await client.run(sandbox.id, "python3", "-c", ORPHANS)).code == 0

    async def no_zombies() -> bool:
        return not any(process.state == "Z" for process in await table(client, sandbox.id))

    await until(no_zombies)
    first = (await table(client, sandbox.id))[0]
    assert (first.pid, first.parent_pid, first.uid) == (1, 0, 0)
    assert first.rss_bytes > MIB


async def test_output_is_never_lost(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    """A process that writes and is gone at once: every byte arrives, whatever the interleaving."""
    size = 3 * MIB
    write = f"import os; os.write(1, b'o' * {size}); os.write(2, b'e' * {size}); os._exit(9)"
    for _ in range(3):
        result = await client.run(sandbox.id, "python3", "-c", write)
        assert (len(result.stdout), len(result.stderr), result.code) == (size, size, 9)
        assert result.stdout.count(b"o") == result.stderr.count(b"e") == size


async def test_a_kill_for_lack_of_memory_is_told_apart(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    result = await client.run(sandbox.id, "python3", "-c", EXHAUST)
    assert result.exit == pb.Exit(signal="SIGKILL", signal_number=9, oom_killed=True), result.stderr
    assert (await client.run(sandbox.id, "sh", "-c", "kill -KILL $$")).exit.oom_killed is False
    assert (await client.run(sandbox.id, "true")).code == 0


async def test_what_cannot_be_started_says_why(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    script = (
        "printf 'x' >plain; printf '#!/nowhere/sh\n' >lost; printf 'no format' >odd; chmod +x lost odd; mkdir -p dir;"
        "mkdir -p closed; chmod 0 closed"
    )
    assert (await client.run(sandbox.id, "sh", "-c", script)).code == 0
    home = "/home/sandbox"
    cases: list[tuple[list[str], dict[str, Any], grpc.StatusCode, str]] = [
        (["no-such-program"], {}, PRECONDITION, "EXEC_NOT_FOUND"),
        (["/no/such/program"], {}, PRECONDITION, "EXEC_NOT_FOUND"),
        (["sh"], {"env": {"PATH": "/nowhere"}}, PRECONDITION, "EXEC_NOT_FOUND"),
        ([f"{home}/lost"], {}, PRECONDITION, "EXEC_NOT_FOUND"),
        ([f"{home}/plain"], {}, PRECONDITION, "EXEC_NOT_EXECUTABLE"),
        ([f"{home}/dir"], {}, PRECONDITION, "EXEC_NOT_EXECUTABLE"),
        ([f"{home}/odd"], {}, PRECONDITION, "EXEC_NOT_EXECUTABLE"),
        (["true"], {"cwd": "/no/such/directory"}, PRECONDITION, "CWD_INVALID"),
        (["true"], {"cwd": f"{home}/plain"}, PRECONDITION, "CWD_INVALID"),
        (["true"], {"cwd": f"{home}/closed"}, PRECONDITION, "CWD_INVALID"),
        (["true"], {"cwd": "/root"}, PRECONDITION, "CWD_INVALID"),
        (["true"], {"user": "nobody-of-this-name"}, PRECONDITION, "USER_UNKNOWN"),
        (["true"], {"user": "-1"}, PRECONDITION, "USER_UNKNOWN"),
        ([], {}, INVALID, "INVALID_SPEC"),
        ([""], {}, INVALID, "INVALID_SPEC"),
        (["true", "a\0b"], {}, INVALID, "INVALID_SPEC"),
        (["true"], {"cwd": "/\0"}, INVALID, "INVALID_SPEC"),
        (["true"], {"cwd": "/" * 100_000}, INVALID, "INVALID_SPEC"),
        (["/" + "x" * 100_000], {}, PRECONDITION, "EXEC_NOT_FOUND"),
        (["x"] * 4097, {}, INVALID, "INVALID_SPEC"),
        (["true", "x" * (1 << 20)], {}, INVALID, "INVALID_SPEC"),
        (["true", "x" * (200 << 10)], {}, INVALID, "E2BIG"),  # one argument: at most 128 KiB in Linux
        (["true"], {"env": {f"V{number}": "x" for number in range(10_000)}}, INVALID, "INVALID_SPEC"),
        (["true"], {"env": {"A=B": "x"}}, INVALID, "INVALID_SPEC"),
        (["true"], {"replay_bytes": 17 * MIB}, INVALID, "INVALID_SPEC"),
    ]
    for argv, fields, code, why in cases:
        with refused(code, why):
            await start(client, sandbox.id, *argv, **fields)
        with refused(code, why):
            await client.run(sandbox.id, *argv, **fields)
    many = {f"V{number}": "x" for number in range(1000)}
    assert len((await client.run(sandbox.id, "env", env=many)).stdout.splitlines()) >= 1000
    assert len((await client.run(sandbox.id, "echo", *["y"] * 4000)).stdout.split()) == 4000
