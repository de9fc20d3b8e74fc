"""What callers can do to the agent and not to others: floods, nonsense, silence, foreign certificates."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import trustme

from sandboxd.v1 import process_pb2
from sandboxd.v1 import sandbox_pb2 as pb
from tests.support.client import MIB, Client
from tests.support.daemon import Daemon, connected, daemon_with, until
from tests.tools.reliability import Reliability

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120)]

FLOOD = 5000
REFUSALS = ("INTERNAL", "UNIMPLEMENTED", "INVALID_ARGUMENT")


# -- mutual TLS --------------------------------------------------------------------------------------------------------


class Party:
    """An authority with a certificate for the node and one for a client."""

    def __init__(self, place: Path) -> None:
        self.authority = trustme.CA()
        self.client = self.authority.issue_cert("scheduler")
        self.files = {name: place / f"{name}.pem" for name in ("cert", "key", "ca")}
        place.mkdir(exist_ok=True)
        self.renew()

    def renew(self) -> None:
        """Gives the node another certificate."""
        server = self.authority.issue_cert("localhost")
        server.cert_chain_pems[0].write_to_path(str(self.files["cert"]))
        server.private_key_pem.write_to_path(str(self.files["key"]))
        self.authority.cert_pem.write_to_path(str(self.files["ca"]))

    def settings(self) -> dict[str, Any]:
        names = {"tls_cert": "cert", "tls_key": "key", "tls_client_ca": "ca"}
        return {f"api__{setting}": str(self.files[name]) for setting, name in names.items()}


@asynccontextmanager
async def dialled(port: int, trusted: trustme.CA, own: trustme.LeafCert | None) -> AsyncIterator[Client]:
    """A client that trusts an authority, with a certificate or without one."""
    root = trusted.cert_pem.bytes()
    key, chain = (None, None) if own is None else (own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())
    credentials = grpc.ssl_channel_credentials(root, key, chain)
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options) as channel:
        yield Client(channel)


async def served(client: Client) -> str:
    """Returns "" if the agent answers, else the name of the code."""
    try:
        await client.sandboxes.ListSandboxes(pb.ListSandboxesRequest(), timeout=10)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return ""


def serial_of(port: int, party: Party) -> int:
    """Returns the serial number of the certificate that the node shows."""
    import ssl

    from cryptography import x509

    context = ssl.create_default_context(cadata=party.authority.cert_pem.bytes().decode())
    context.set_alpn_protocols(["h2"])
    party.client.configure_cert(context)
    with (
        socket.create_connection(("127.0.0.1", port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as sock,
    ):
        shown = sock.getpeercert(binary_form=True)
    assert shown
    return x509.load_der_x509_certificate(shown).serial_number


async def test_mutual_tls(directory: Path, reliability: Reliability) -> None:
    ours, theirs = Party(directory / "ours"), Party(directory / "theirs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with daemon_with(directory, api__tcp_address=f"127.0.0.1:{port}", **ours.settings()) as daemon:
        async with dialled(port, ours.authority, ours.client) as client:
            assert await served(client) == ""
        assert "scheduler" in daemon.log  # the audit log knows who it was
        async with dialled(port, ours.authority, None) as client:
            assert await served(client) == "UNAVAILABLE"
        async with dialled(port, ours.authority, theirs.client) as client:
            assert await served(client) == "UNAVAILABLE"
        async with dialled(port, theirs.authority, ours.client) as client:
            assert await served(client) == "UNAVAILABLE"
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert await served(Client(channel)) == "UNAVAILABLE"
        before = serial_of(port, ours)
        ours.renew()
        daemon.process.send_signal(signal.SIGHUP)
        await until(lambda: asyncio.to_thread(lambda: serial_of(port, ours) != before))
        async with dialled(port, ours.authority, ours.client) as client:
            assert await served(client) == ""
    reliability.seen(
        "mutual TLS: no certificate, one of another authority, another server, no TLS",
        "refused in the handshake; who is let in is in the audit log; certificates are renewed by SIGHUP",
        "four refused; a renewed certificate was shown without a restart",
    )


# -- nonsense ----------------------------------------------------------------------------------------------------------


async def raw(channel: grpc.aio.Channel, method: str, body: bytes) -> str:
    """Sends a body as it is; returns the name of the code."""
    call: Any = channel.unary_unary(method, None, None)
    try:
        await call(body, timeout=10)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


async def test_what_is_no_protobuf(client: Client, daemon: Daemon, reliability: Reliability) -> None:
    methods = ("SandboxService/CreateSandbox", "SandboxService/DeleteSandbox", "NodeService/GetNode", "None/None")
    bodies = (b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", os.urandom(1000), b"\x08")
    said = len(daemon.log)
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        for method in methods:
            for body in bodies:
                assert await raw(channel, f"/sandboxd.v1.{method}", body) in REFUSALS
        assert await raw(channel, "/sandboxd.v1.NodeService/GetNode", bytes(9 << 20)) == "RESOURCE_EXHAUSTED"
    # And what is no HTTP/2.
    for noise in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(4096)):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(daemon.socket))
            sock.sendall(noise)
            while True:
                try:
                    if not sock.recv(4096):
                        break
                except ConnectionError:
                    break
                except TimeoutError:
                    break
    assert await served(client) == ""
    assert "Traceback" not in daemon.log[said:]
    reliability.seen(
        "requests that are no protobuf, too large, or no HTTP/2", "refused by code; nothing else notices",
        f"{len(methods) * len(bodies) + 4} refused, no traceback in the log",
    )  # fmt: skip


# -- floods and silence ------------------------------------------------------------------------------------------------


async def test_a_flood_of_calls(client: Client, daemon: Daemon, sandbox: pb.Sandbox, reliability: Reliability) -> None:
    process = psutil.Process(daemon.process.pid)
    before = process.memory_info().rss
    flooding = asyncio.create_task(flood(daemon))
    slowest = await client.slowest_beside(sandbox.id, flooding)
    assert flooding.result() == FLOOD
    grown = process.memory_info().rss - before
    assert grown < 64 * MIB
    assert slowest < 10
    reliability.seen(
        f"{FLOOD:,} calls as fast as they go, 200 at a time", "all answered; others wait a moment; memory is flat",
        f"another's exec took {slowest:.1f} s at most; agent {max(0, grown) >> 20} MiB more",
    )  # fmt: skip


async def flood(daemon: Daemon) -> int:
    answered = 0
    async with connected(daemon) as client:
        for _ in range(FLOOD // 200):
            results = await asyncio.gather(*(served(client) for _ in range(200)))
            answered += results.count("")
    return answered


async def test_a_reader_that_does_not_read(
    client: Client, daemon: Daemon, sandbox: pb.Sandbox, reliability: Reliability
) -> None:
    """The guest's process is held back by its pipe; neither the agent nor the guest's init keeps what nobody takes."""
    process = psutil.Process(daemon.process.pid)
    before = process.memory_info().rss
    calls = []
    for _ in range(8):
        exec_stream: Any = client.processes.Exec
        call = exec_stream()
        spec = process_pb2.ProcessSpec(argv=["cat", "/dev/zero"])
        start = process_pb2.ExecRequest.Start(sandbox_id=sandbox.id, spec=spec)
        await call.write(process_pb2.ExecRequest(start=start))
        await call.read()
        calls.append(call)
    await asyncio.sleep(3)
    grown = process.memory_info().rss - before
    assert grown < 64 * MIB
    assert (await client.run(sandbox.id, "true")).code == 0
    for call in calls:
        call.cancel()
    reliability.seen(
        "8 callers of endless output that read none of it", "the processes wait; the agent's memory is bounded",
        f"agent {max(0, grown) >> 20} MiB more; an exec beside them was answered",
    )  # fmt: skip


@contextmanager
def no_more_descriptors(pid: int) -> Iterator[None]:
    """Lets a process open nothing any more."""
    process = psutil.Process(pid)
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    first_free = next(number for number in range(1 << 16) if number not in taken)
    before = process.rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (first_free, before[1]))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_NOFILE, before)


async def test_an_agent_without_descriptors(
    client: Client, daemon: Daemon, sandbox: pb.Sandbox, reliability: Reliability
) -> None:
    """Who is there is served on; new connections wait until there is room."""
    running = asyncio.create_task(client.run(sandbox.id, "sh", "-c", "sleep 3; echo late"))
    await asyncio.sleep(0.5)
    with no_more_descriptors(daemon.process.pid):
        assert await served(client) == ""
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.sandboxes.CreateSandbox(pb.CreateSandboxRequest(memory_bytes=128 * MIB), timeout=60)
        assert "Too many open files" in str(refused.value.details()), refused.value.details()
        assert (await running).stdout == b"late\n"
    async with connected(daemon) as fresh, fresh.sandbox(memory_bytes=128 * MIB) as made:
        assert (await fresh.run(made.id, "true")).code == 0
    reliability.seen(
        "the agent has no file descriptor left", "calls on open connections go on; creates say so, and leave nothing",
        f"a create: {refused.value.details()}; one after it was made",
    )  # fmt: skip


@contextmanager
def no_more_tasks(pid: int) -> Iterator[None]:
    """Holds a process to the threads that it has."""
    place = Path(f"/sys/fs/cgroup/pids/sandboxd-test-{os.getpid()}")
    try:
        place.mkdir()
    except OSError as error:
        pytest.skip(f"no pids controller of cgroup v1 here: {error}")
    (place / "cgroup.procs").write_text(str(pid))
    (place / "pids.max").write_text((place / "pids.current").read_text())
    try:
        yield
    finally:
        (place / "pids.max").write_text("max")
        (place.parent / "cgroup.procs").write_text(str(pid))
        place.rmdir()


async def test_the_agent_may_start_no_thread_or_process(
    client: Client, daemon: Daemon, sandbox: pb.Sandbox, reliability: Reliability
) -> None:
    with no_more_tasks(daemon.process.pid):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.sandboxes.CreateSandbox(pb.CreateSandboxRequest(memory_bytes=128 * MIB), timeout=60)
        assert "no more threads or processes" in str(refused.value.details()), refused.value.details()
        assert (await client.run(sandbox.id, "true")).code == 0
    async with client.sandbox(memory_bytes=128 * MIB):
        pass
    reliability.seen(
        "no process or thread can be started on the host", "creates fail and leave nothing; sandboxes that run go on",
        f"a create: {refused.value.details()}; an exec was answered",
    )  # fmt: skip
