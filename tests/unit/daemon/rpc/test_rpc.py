"""The API over its real sockets, with a fake host behind it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from agent.common.background import Backoff
from agent.common.config.daemon import ApiSettings
from agent.common.errors import ConfigError, GuestError, GuestUnreachable, NotFound
from agent.common.telemetry import ERRORS
from agent.daemon.rpc import status
from agent.daemon.rpc.auth.peercred import PeerSocket
from agent.daemon.rpc.convert.guest_values import guest_float, guest_int
from agent.daemon.rpc.server import ApiServer
from guest.wire import Frame
from sandboxd.v1 import network_pb2, node_pb2, process_pb2, sandbox_pb2
from tests.support import leaks
from tests.support.client import MIB, Client, reason
from tests.support.daemon_fakes import Bench, bench

ID = "sbx-0000000000000000"
PROCESS = {
    "id": 1, "pid": 7, "argv": ["x"], "user": "sandbox", "cwd": "/", "start_ns": 1, "tty": False, "exit": None,
}  # fmt: skip
EXITED = {"exit": {"code": 3, "signal": 0, "signal_name": "", "oom": False}}


@dataclasses.dataclass
class Api:
    node: Bench
    server: ApiServer
    client: Client
    channel: grpc.aio.Channel


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short: unix sockets lie below it."""
    path = leaks.make_directory()
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def api(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    async with bench(directory, monkeypatch) as node:
        server = ApiServer(node.host.settings, node.sandboxes, node.supervisor)
        await server.start()
        async with grpc.aio.insecure_channel(f"unix:{server.socket_path}") as channel:
            yield Api(node, server, Client(channel), channel)
        await server.stop(0)


def failed(code: grpc.StatusCode, why: str, error: grpc.aio.AioRpcError) -> None:
    assert (error.code(), reason(error)) == (code, why)


async def exec_messages(*later: Any) -> AsyncIterator[process_pb2.ExecRequest]:
    (sandbox_id, *requests) = later
    spec = process_pb2.ProcessSpec(argv=["x"], stdin=process_pb2.ProcessSpec.STDIN_PIPE)
    yield process_pb2.ExecRequest(start=process_pb2.ExecRequest.Start(sandbox_id=sandbox_id, spec=spec))
    for request in requests:
        yield request


# -- sandboxes ---------------------------------------------------------------------------------------------------------


async def test_create_list_update_delete(api: Api) -> None:
    sandboxes = api.client.sandboxes
    ids = []
    for number in range(3):
        request = sandbox_pb2.CreateSandboxRequest(memory_bytes=64 * MIB, labels={"n": str(number), "all": "yes"})
        made = await sandboxes.CreateSandbox(request)
        assert made.state == sandbox_pb2.Sandbox.STATE_RUNNING
        assert [phase.name for phase in made.phases][-1] == "create"
        ids.append(made.id)
    page = await sandboxes.ListSandboxes(sandbox_pb2.ListSandboxesRequest(page_size=2, labels={"all": ""}))
    rest = await sandboxes.ListSandboxes(sandbox_pb2.ListSandboxesRequest(page_size=2, page_token=page.next_page_token))
    assert [found.id for found in [*page.sandboxes, *rest.sandboxes]] == ids
    assert rest.next_page_token == ""
    found = await sandboxes.ListSandboxes(sandbox_pb2.ListSandboxesRequest(labels={"n": "1"}))
    assert [one.id for one in found.sandboxes] == [ids[1]]
    await sandboxes.UpdateSandbox(
        sandbox_pb2.UpdateSandboxRequest(id=ids[0], set_labels={"x": "y"}, remove_labels=["n"])
    )
    assert (await sandboxes.GetSandbox(sandbox_pb2.GetSandboxRequest(id=ids[0]))).labels == {"all": "yes", "x": "y"}
    for sandbox_id in ids:
        await sandboxes.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=sandbox_id))
    assert api.node.left() == []
    await sandboxes.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=ids[0], allow_missing=True))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await sandboxes.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=ids[0]))
    failed(grpc.StatusCode.NOT_FOUND, "SANDBOX_NOT_FOUND", caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": "../x"}, "image name"),
        ({"vcpus": -1}, "vcpus is -1"),
        ({"memory_bytes": -1}, "memory_bytes is -1"),
        ({"memory_bytes": 64 * MIB + 1}, "multiple of 1 MiB"),
        ({"memory_bytes": 1 << 62}, "at most"),
        ({"disk_bytes": 1}, "disk_bytes is 1"),
        ({"disk_bytes": 1 << 62}, "disk_bytes is"),
        ({"env": {f"V{number}": "" for number in range(10_000)}}, "env has 10000 variables"),
        ({"env": {"A": "x" * (128 << 10)}}, "write a file"),
        ({"env": {"A=B": ""}}, "'='"),
        ({"env": {"A": "\0"}}, "NUL"),
        ({"labels": {"ä": ""}}, "label key"),
        ({"labels": {"a": "x" * 257}}, "256 bytes"),
        ({"labels": {f"l{number}": "" for number in range(65)}}, "65 labels"),
        ({"request_id": "a b"}, "request_id"),
        ({"lifetime": sandbox_pb2.Lifetime(duration=Duration(seconds=-1))}, "lifetime.duration"),
        ({"lifetime": sandbox_pb2.Lifetime(lease=Duration(nanos=1))}, "lifetime.lease"),
        ({"lifetime": sandbox_pb2.Lifetime(duration=Duration(seconds=1 << 60))}, "ten years"),
    ],
)
async def test_wrong_specs_are_refused_with_advice(api: Api, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await api.client.sandboxes.CreateSandbox(sandbox_pb2.CreateSandboxRequest(**fields))
    failed(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC", caught.value)
    assert message in (caught.value.details() or "")
    assert api.node.left() == []


async def test_absurd_times_and_tokens_are_refused(api: Api) -> None:
    async with api.client.sandbox(memory_bytes=64 * MIB) as made:
        for seconds in (-(1 << 62), 0, 1 << 62):
            request = sandbox_pb2.UpdateSandboxRequest(id=made.id)
            request.expire_time.seconds = seconds
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await api.client.sandboxes.UpdateSandbox(request)
            failed(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC", caught.value)
    for token in ("ä", "x", "eA=="):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.client.sandboxes.ListSandboxes(sandbox_pb2.ListSandboxesRequest(page_token=token))
        failed(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC", caught.value)


async def test_a_delete_during_a_create_is_told_to_its_caller(api: Api) -> None:
    api.node.world.hangs.add("dial")
    request = sandbox_pb2.CreateSandboxRequest(memory_bytes=64 * MIB)
    creating = asyncio.ensure_future(api.client.sandboxes.CreateSandbox(request))
    await api.node.world.reached["dial"].wait()
    (found,) = api.node.sandboxes.list()
    await api.client.sandboxes.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=found.id))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await creating
    failed(grpc.StatusCode.FAILED_PRECONDITION, "SANDBOX_DELETED", caught.value)
    assert api.node.left() == []


async def test_keep_alive_renews_and_its_end_deletes_nothing(api: Api) -> None:
    lease = sandbox_pb2.Lifetime(lease=Duration(seconds=60))
    async with api.client.sandbox(memory_bytes=64 * MIB, lifetime=lease) as made:
        call = api.client.sandboxes.KeepAlive()  # type: ignore[call-arg]  # the stubs know iterators alone
        await call.write(sandbox_pb2.KeepAliveRequest(id=made.id))
        first: Any = await call.read()
        await call.write(sandbox_pb2.KeepAliveRequest())
        second: Any = await call.read()
        assert second.expire_time.ToNanoseconds() > first.expire_time.ToNanoseconds()
        call.cancel()
        assert (await api.client.sandboxes.GetSandbox(sandbox_pb2.GetSandboxRequest(id=made.id))).id == made.id


async def test_watch_tells_what_happens(api: Api) -> None:
    call = api.client.sandboxes.WatchSandboxes(sandbox_pb2.WatchSandboxesRequest())
    first: Any = await call.read()
    assert first.type == sandbox_pb2.SandboxEvent.TYPE_SYNCED
    async with api.client.sandbox(memory_bytes=64 * MIB):
        pass
    kinds: list[Any] = [await call.read() for _ in range(4)]
    event = sandbox_pb2.SandboxEvent
    assert [kind.type for kind in kinds] == [
        event.TYPE_CREATED, event.TYPE_UPDATED, event.TYPE_UPDATED, event.TYPE_DELETED,
    ]  # fmt: skip
    assert kinds[-1].reason == "requested"
    call.cancel()


async def test_the_console_of_a_failed_sandbox(api: Api) -> None:
    async with api.client.sandbox(memory_bytes=64 * MIB) as made:
        api.node.world.vms[made.id].die()
        request = sandbox_pb2.GetConsoleRequest(id=made.id, follow=True)
        text = b"".join([piece.data async for piece in api.client.sandboxes.GetConsole(request)])
        assert b"Kernel panic" in text


# -- processes ---------------------------------------------------------------------------------------------------------


async def test_exec_carries_both_ways(api: Api) -> None:
    api.node.world.script = [
        (Frame.EVENT, {"process": PROCESS}), 2, (Frame.STDOUT, b"out"), (Frame.STDERR, b"err"), (Frame.RESULT, EXITED),
    ]  # fmt: skip
    async with api.client.sandbox(memory_bytes=64 * MIB) as made:
        result = await api.client.run(made.id, "cat", stdin=b"in")
    assert (result.stdout, result.stderr, result.code) == (b"out", b"err", 3)
    (stream,) = api.node.world.streams
    assert stream.sent == [("DATA", b"in"), ("EOF", b"")]


@pytest.mark.parametrize(
    ("answer", "code", "why"),
    [
        ((Frame.RESULT, {}), grpc.StatusCode.UNAVAILABLE, "GUEST_MALFORMED"),
        ((Frame.RESULT, {"exit": {"code": 1 << 40, "signal": 0, "signal_name": ""}}), grpc.StatusCode.UNAVAILABLE,
         "GUEST_MALFORMED"),
        ((Frame.EVENT, {"process": {**PROCESS, "argv": "x"}}), grpc.StatusCode.UNAVAILABLE, "GUEST_MALFORMED"),
        ((Frame.EVENT, {"process": {**PROCESS, "pid": True}}), grpc.StatusCode.UNAVAILABLE, "GUEST_MALFORMED"),
        (GuestError("bad \ud800 \udcff", reason="EXEC_NOT_FOUND"), grpc.StatusCode.FAILED_PRECONDITION,
         "EXEC_NOT_FOUND"),
        (GuestUnreachable("gone"), grpc.StatusCode.UNAVAILABLE, "GUEST_UNREACHABLE"),
    ],
)  # fmt: skip
async def test_a_guest_that_answers_wrongly_is_a_typed_error(
    api: Api, answer: Any, code: grpc.StatusCode, why: str
) -> None:
    api.node.world.script = [answer]
    async with api.client.sandbox(memory_bytes=64 * MIB) as made:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.client.run(made.id, "x")
    failed(code, why, caught.value)


async def test_text_that_is_not_utf8_is_replaced(api: Api) -> None:
    api.node.world.script = [
        (Frame.EVENT, {"process": {**PROCESS, "cwd": "/\udcff", "user": "\ud800"}}), (Frame.RESULT, EXITED),
    ]  # fmt: skip
    async with api.client.sandbox(memory_bytes=64 * MIB) as made:
        responses = [one async for one in api.client.processes.Exec(exec_messages(made.id))]
    assert (responses[0].process.cwd, responses[0].process.user) == ("/\ufffd", "?")


async def test_a_wrong_message_in_mid_stream_ends_the_call_with_its_reason(api: Api) -> None:
    api.node.world.script = [(Frame.EVENT, {"process": PROCESS}), 5]
    wrong = process_pb2.ExecRequest(resize=process_pb2.Terminal(rows=-1, cols=1))
    async with api.client.sandbox(memory_bytes=64 * MIB) as made:
        call = api.client.processes.Exec(exec_messages(made.id, wrong))
        await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call.read(), 2)
    failed(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC", caught.value)


async def test_a_malformed_message_in_mid_stream_ends_a_dialled_connection(api: Api) -> None:
    api.node.world.script = [(Frame.EVENT, {}), 5]
    async with api.client.sandbox(memory_bytes=64 * MIB) as made:
        opening = network_pb2.DialRequest(open=network_pb2.DialRequest.Open(sandbox_id=made.id, port=80))
        # The stubs describe the blocking API; without serializers, messages are bytes.
        call = api.channel.stream_stream("/sandboxd.v1.NetworkService/Dial")()  # type: ignore[call-arg]
        await call.write(opening.SerializeToString())
        await call.read()
        await call.write(b"\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call.read(), 2)
    failed(grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST", caught.value)


async def test_a_client_that_leaves_ends_the_guests_call(api: Api) -> None:
    api.node.world.script = [(Frame.EVENT, {"process": PROCESS}), 5]
    async with api.client.sandbox(memory_bytes=64 * MIB) as made:
        call = api.client.processes.Exec(exec_messages(made.id))
        await call.read()
        call.cancel()
        async with asyncio.timeout(2):
            await api.node.world.streams[0].ended.wait()


@pytest.mark.parametrize(
    "spec",
    [
        {"argv": []},
        {"argv": [""]},
        {"argv": ["x"] * 4097},
        {"argv": ["x\0"]},
        {"argv": ["x" * (1 << 20)]},
        {"argv": ["x"], "cwd": "\0"},
        {"argv": ["x"], "cwd": "/" * 5000},
        {"argv": ["x"], "replay_bytes": -1},
        {"argv": ["x"], "terminal": process_pb2.Terminal(rows=70000)},
    ],
)
async def test_wrong_process_specs_are_refused(api: Api, spec: dict[str, Any]) -> None:
    request = process_pb2.StartProcessRequest(sandbox_id=ID, spec=process_pb2.ProcessSpec(**spec))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await api.client.processes.StartProcess(request)
    failed(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC", caught.value)


# -- errors, node, server ----------------------------------------------------------------------------------------------


async def test_what_nobody_expected_is_hidden_behind_an_incident(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(sandbox_id: str) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(api.node.sandboxes, "inspect", broken)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await api.client.sandboxes.GetSandbox(sandbox_pb2.GetSandboxRequest(id=ID))
    failed(grpc.StatusCode.INTERNAL, "INTERNAL", caught.value)
    assert "secret" not in (caught.value.details() or "")
    assert "incident" in (caught.value.details() or "")


def test_long_messages_keep_beginning_and_end() -> None:
    _, made = status.to_status(NotFound("begin " + "x" * 10_000 + " end"))
    assert made.details.startswith("begin")
    assert made.details.endswith(" end")
    assert len(made.details) < 3100


def test_words_of_guests_do_not_fill_the_metrics() -> None:
    for number in range(1000):
        status.to_status(GuestError("x", reason=f"WORD_{number}"))
    assert len(next(iter(ERRORS.collect())).samples) < 1000


def test_every_error_of_ours_has_a_code() -> None:
    for kind in status.CODES:
        assert status.code_of(kind("x")) is status.CODES[kind]


def test_numbers_of_guests_are_checked() -> None:
    for value in (None, "1", True, -1, 1 << 70, 1.5):
        with pytest.raises(GuestUnreachable):
            guest_int({"n": value}, "n")
    for number in (None, "1", True, float("nan"), float("inf")):
        with pytest.raises(GuestUnreachable):
            guest_float({"n": number}, "n")


async def test_the_node_and_its_changes(api: Api) -> None:
    node = await api.client.nodes.GetNode(node_pb2.GetNodeRequest())
    assert (node.vmm, node.accelerator, node.state) == ("fake", "tcg", node_pb2.Node.STATE_READY)
    assert [image.name for image in node.images] == ["minimal"]
    call = api.client.nodes.WatchNode(node_pb2.WatchNodeRequest(interval_seconds=3600))
    first: Any = await call.read()
    assert first.sandboxes.allocated == 0
    async with api.client.sandbox(memory_bytes=64 * MIB), asyncio.timeout(2):
        later: Any = await call.read()
        while later.sandboxes.allocated != 1:
            later = await call.read()
    call.cancel()


async def test_health_and_the_node_tell_of_a_loop_that_fails_until_it_has_recovered(api: Api) -> None:
    healed = asyncio.Event()

    async def loop() -> None:
        if not healed.is_set():
            raise RuntimeError("can't start new thread")
        await asyncio.Event().wait()

    status = health_pb2.HealthCheckResponse
    health = health_pb2_grpc.HealthStub(api.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service="sandboxd.background"))
    nodes: Any = api.client.nodes.WatchNode(node_pb2.WatchNodeRequest(interval_seconds=3600))
    async with asyncio.timeout(10):
        assert (await watch.read()).status == status.SERVING
        assert (await nodes.read()).degraded == []
        failing = api.node.supervisor.start("drop-counters", loop, Backoff(0.01, 0.01, settle_s=0.3))
        assert (await watch.read()).status == status.NOT_SERVING
        (sentence,) = (await nodes.read()).degraded
        assert "drop-counters fails" in sentence
        assert "can't start new thread" in sentence
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == status.SERVING
        healed.set()
        assert (await watch.read()).status == status.SERVING
        while (await nodes.read()).degraded:
            pass
    await failing.stop()
    watch.cancel()
    nodes.cancel()


async def test_health_and_reflection(api: Api) -> None:
    health = health_pb2_grpc.HealthStub(api.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(api.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    response = await call.read()
    names = {service.name for service in response.list_services_response.service}
    assert {"sandboxd.v1.SandboxService", "sandboxd.v1.FileService", "grpc.health.v1.Health"} <= names
    call.cancel()


# -- who may speak -----------------------------------------------------------------------------------------------------


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends back what came, once the client has ended its side, and the name of the peer before it."""
    data = await reader.read()
    writer.write(writer.get_extra_info("peername") + b"\n" + data)
    writer.write_eof()
    await writer.drain()
    writer.close()


@pytest.mark.parametrize("allowed", [True, False])
async def test_the_unix_socket_knows_its_peers(directory: Path, allowed: bool) -> None:
    inner = await asyncio.start_unix_server(echo, directory / "private")
    peers = PeerSocket(directory / "public", directory / "private", set(), {os.getgid()} if allowed else set())
    await peers.start()
    reader, writer = await asyncio.open_unix_connection(directory / "public")
    sent = os.urandom(4 << 20)
    try:
        writer.write(sent)
        writer.write_eof()
        received = await reader.read()
    except ConnectionError:
        received = b""
    if allowed:
        name, _, data = received.partition(b"\n")
        assert name.endswith(f"uid={os.getuid()},pid={os.getpid()}".encode())
        assert data == sent
    else:
        assert received == b""
    writer.close()
    await peers.aclose()
    inner.close()
    assert not (directory / "public").exists()


async def test_plain_tcp_only_on_loopback(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(directory, monkeypatch) as node:
        settings = dataclasses.replace(
            node.host.settings, api=ApiSettings(tcp_address="0.0.0.0:0", allow_insecure_loopback=True)
        )
        server = ApiServer(settings, node.sandboxes, node.supervisor)
        with pytest.raises(ConfigError, match="not loopback"):
            await server.start()
        await server.stop(0)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
async def test_tcp_asks_for_a_clients_certificate(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(  # noqa: ASYNC221
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = ApiSettings(tcp_address="127.0.0.1:0", tls_cert=str(cert), tls_key=str(key), tls_client_ca=str(cert))
    async with bench(directory, monkeypatch) as node:
        server = ApiServer(dataclasses.replace(node.host.settings, api=tls), node.sandboxes, node.supervisor)
        await server.start()
        known = grpc.ssl_channel_credentials(cert.read_bytes(), key.read_bytes(), cert.read_bytes())
        unknown = grpc.ssl_channel_credentials(cert.read_bytes())
        options = [("grpc.ssl_target_name_override", "localhost")]
        target = f"127.0.0.1:{server.tcp_port}"
        async with grpc.aio.secure_channel(target, known, options) as channel:
            assert (await Client(channel).nodes.GetNode(node_pb2.GetNodeRequest())).name == "node"
        async with grpc.aio.secure_channel(target, unknown, options) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await Client(channel).nodes.GetNode(node_pb2.GetNodeRequest(), timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await server.stop(0)


async def test_a_socket_file_left_behind_is_replaced(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(directory / "public"))
    peers = PeerSocket(directory / "public", directory / "private", {os.getuid()}, set())
    await peers.start()
    await peers.aclose()
    await peers.aclose()
    assert not (directory / "public").exists()
