"""The API as its users meet it: reflection, health, mutual TLS, metrics, and what it refuses."""

from __future__ import annotations

import socket
import subprocess
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client.parser import text_string_to_metric_families

from sandboxd.v1 import node_pb2, sandbox_pb2
from tests.support.client import MIB, Client
from tests.support.daemon import Daemon, connected, daemon_with, refused

pytestmark = pytest.mark.vm

SERVICES = {
    f"sandboxd.v1.{name}Service"
    for name in ("Sandbox", "Process", "File", "Network", "Volume", "Node", "Image", "Template")
} | {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}  # fmt: skip
INVALID = grpc.StatusCode.INVALID_ARGUMENT


class Dynamic:
    """A client that knows nothing but what the server says of itself."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self.pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))

    def call(self, method: str, *requests: dict[str, Any]) -> list[dict[str, Any]]:
        """Calls `service/method` with messages as JSON objects, and returns the answers so."""
        service, _, name = method.partition("/")
        found = self.pool.FindServiceByName(service).FindMethodByName(name)
        input_type, output_type = (message_factory.GetMessageClass(t) for t in (found.input_type, found.output_type))
        messages = [json_format.ParseDict(request, input_type()) for request in requests]
        kind = f"{'stream' if found.client_streaming else 'unary'}_{'stream' if found.server_streaming else 'unary'}"
        stub = getattr(self._channel, kind)(
            f"/{method}",
            request_serializer=input_type.SerializeToString,
            response_deserializer=output_type.FromString,
        )
        answer = stub(iter(messages) if found.client_streaming else messages[0], timeout=60)
        answers = list(answer) if found.server_streaming else [answer]
        return [json_format.MessageToDict(one, preserving_proto_field_name=True) for one in answers]


def test_a_client_made_of_reflection_alone_creates_executes_and_deletes(daemon: Daemon) -> None:
    with grpc.insecure_channel(daemon.address) as channel:
        assert set(ProtoReflectionDescriptorDatabase(channel).get_services()) == SERVICES
        client = Dynamic(channel)
        request = {"memory_bytes": 256 * MIB, "labels": {"made": "dynamically"}}
        (made,) = client.call("sandboxd.v1.SandboxService/CreateSandbox", request)
        try:
            assert made["state"] == "STATE_RUNNING"
            start = {"sandbox_id": made["id"], "spec": {"argv": ["ls", "-lh", "/"]}}
            answers = client.call("sandboxd.v1.ProcessService/Exec", {"start": start})
            assert answers[0]["process"]["argv"] == ["ls", "-lh", "/"]
            assert any("stdout" in answer for answer in answers)
            assert answers[-1] == {"exit": {"exit_code": 0}}
        finally:
            client.call("sandboxd.v1.SandboxService/DeleteSandbox", {"id": made["id"]})
        assert client.call("sandboxd.v1.SandboxService/ListSandboxes", {"labels": {"made": ""}}) == [{}]
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_node_and_its_images_describe_themselves(client: Client) -> None:
    node = await client.nodes.GetNode(node_pb2.GetNodeRequest())
    assert (node.state, node.vmm) == (node_pb2.Node.STATE_READY, "qemu")
    assert node.accelerator in ("tcg", "kvm")
    assert node.vmm_reason
    for resource in (node.cpu_millis, node.memory_bytes, node.disk_bytes, node.sandboxes):
        assert resource.allocatable > 0
        assert resource.allocated <= resource.allocatable
    image = await client.images.GetImage(node_pb2.GetImageRequest(name="minimal"))
    assert image.digest.startswith("sha256:")
    assert any(package.startswith("python3=") for package in image.packages)
    listed = (await client.images.ListImages(node_pb2.ListImagesRequest())).images
    assert image.digest in [one.digest for one in listed]
    with refused(grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND"):
        await client.images.GetImage(node_pb2.GetImageRequest(name="none"))


# -- what CreateSandbox refuses ----------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], grpc.StatusCode, str]] = [
    ({"image": "none"}, grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND"),
    ({"image": "../minimal"}, INVALID, "INVALID_SPEC"),
    ({"image": "x" * 100_000}, INVALID, "INVALID_SPEC"),
    ({"memory_bytes": 16 * MIB}, INVALID, "INVALID_SPEC"),
    ({"memory_bytes": 256 * MIB + 1}, INVALID, "INVALID_SPEC"),
    ({"memory_bytes": -256 * MIB}, INVALID, "INVALID_SPEC"),
    ({"memory_bytes": 1 << 62}, INVALID, "INVALID_SPEC"),
    ({"memory_bytes": 63 << 30}, grpc.StatusCode.RESOURCE_EXHAUSTED, "NODE_FULL"),
    ({"vcpus": -1}, INVALID, "INVALID_SPEC"),
    ({"vcpus": 1 << 30}, INVALID, "INVALID_SPEC"),
    ({"disk_bytes": -1}, INVALID, "INVALID_SPEC"),
    ({"disk_bytes": 1}, INVALID, "INVALID_SPEC"),
    ({"disk_bytes": 1 << 62}, INVALID, "INVALID_SPEC"),
    ({"env": {f"V{number}": "x" for number in range(10_000)}}, INVALID, "INVALID_SPEC"),
    ({"env": {"A": "x" * (1 << 20)}}, INVALID, "INVALID_SPEC"),
    ({"env": {"A=": "x"}}, INVALID, "INVALID_SPEC"),
    ({"env": {"": "x"}}, INVALID, "INVALID_SPEC"),
    ({"labels": {"a b": "x"}}, INVALID, "INVALID_SPEC"),
    ({"labels": {"a": "x" * 1000}}, INVALID, "INVALID_SPEC"),
    ({"labels": {f"l{number}": "" for number in range(100)}}, INVALID, "INVALID_SPEC"),
    ({"request_id": "a\0b"}, INVALID, "INVALID_SPEC"),
    ({"request_id": "x" * 129}, INVALID, "INVALID_SPEC"),
]


async def test_bad_requests_are_refused_and_leave_nothing(client: Client, daemon: Daemon) -> None:
    before = daemon.left()
    for fields, code, why in WRONG:
        with refused(code, why) as caught:
            await client.sandboxes.CreateSandbox(sandbox_pb2.CreateSandboxRequest(**fields))
        assert len(str(caught.value.details())) < 500
    assert daemon.left() == before
    for sandbox_id in ("", "x", "sbx-", "../../etc", "sbx-" + "A" * 16, "x" * 100_000):
        with refused(INVALID, "INVALID_SPEC"):
            await client.sandboxes.GetSandbox(sandbox_pb2.GetSandboxRequest(id=sandbox_id))


# -- TCP with mutual TLS, metrics --------------------------------------------------------------------------------------


KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def _openssl(directory: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True)


@pytest.fixture
def certificates(directory: Path) -> Path:
    """A directory with an authority and what it signed for a server and a client; and a stranger's."""
    for authority in ("ca", "other"):
        _openssl(directory, "req", "-x509", *KEY, "-days", "1", "-subj", f"/CN={authority}",
                 "-keyout", f"{authority}.key", "-out", f"{authority}.crt")  # fmt: skip
    for name, authority in (("server", "ca"), ("client", "ca"), ("stranger", "other")):
        (directory / "ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        _openssl(directory, "req", *KEY, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        _openssl(directory, "x509", "-req", "-days", "1", "-in", f"{name}.csr", "-CA", f"{authority}.crt", "-CAkey",
                 f"{authority}.key", "-CAcreateserial", "-extfile", "ext", "-out", f"{name}.crt")  # fmt: skip
    return directory


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
async def served(certificates: Path) -> AsyncIterator[tuple[Daemon, str, str]]:
    """A daemon with TCP and metrics; yields it and both addresses."""
    tcp, metrics = (f"127.0.0.1:{_free_port()}" for _ in range(2))
    tls: dict[str, Any] = {f"api__tls_{key}": str(certificates / name) for key, name in
           (("cert", "server.crt"), ("key", "server.key"), ("client_ca", "ca.crt"))}  # fmt: skip
    with daemon_with(certificates, api__tcp_address=tcp, metrics__address=metrics, **tls) as daemon:
        yield daemon, tcp, metrics


def _credentials(directory: Path, client: str) -> grpc.ChannelCredentials:
    key, chain = ((directory / f"{client}.{kind}").read_bytes() for kind in ("key", "crt")) if client else (None, None)
    return grpc.ssl_channel_credentials((directory / "ca.crt").read_bytes(), key, chain)


async def test_tcp_wants_a_certificate_and_metrics_name_no_sandbox(served: tuple[Daemon, str, str]) -> None:
    daemon, tcp, metrics = served
    node = node_pb2.GetNodeRequest()
    for client in ("", "stranger"):
        async with grpc.aio.secure_channel(tcp, _credentials(daemon.directory, client)) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await Client(channel).nodes.GetNode(node, timeout=5)
            assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    async with grpc.aio.insecure_channel(tcp) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await Client(channel).nodes.GetNode(node, timeout=5)
    async with grpc.aio.secure_channel(tcp, _credentials(daemon.directory, "client")) as channel:
        client_by_tcp = Client(channel)
        assert (await client_by_tcp.nodes.GetNode(node, timeout=5)).vmm == "qemu"
        async with client_by_tcp.sandbox() as made, connected(daemon) as client_by_socket:
            assert (await client_by_tcp.run(made.id, "echo", "x")).stdout == b"x\n"
            with refused(grpc.StatusCode.NOT_FOUND, "SANDBOX_NOT_FOUND"):
                await client_by_socket.run("sbx-0000000000000000", "true")
            text = urllib.request.urlopen(f"http://{metrics}/metrics", timeout=5).read().decode()  # noqa: ASYNC210
            _check_metrics(text, made)


def _check_metrics(text: str, made: sandbox_pb2.Sandbox) -> None:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def value(name: str, **labels: str) -> float:
        (found,) = [sample.value for sample in samples if (sample.name, sample.labels) == (name, labels)]
        return float(found)

    for phase in made.phases:
        assert value("sandboxd_phase_seconds_count", phase=phase.name) == 1
        seconds = phase.duration.ToMicroseconds() / 1e6
        assert value("sandboxd_phase_seconds_sum", phase=phase.name) == pytest.approx(seconds, abs=1e-5)
    states = {"creating": 0, "running": 1, "failed": 0, "deleting": 0}
    for state, count in states.items():
        assert value("sandboxd_sandboxes", state=state) == count
    assert value("sandboxd_creates_total", outcome="ok") == 1
    assert value("sandboxd_errors_total", reason="SANDBOX_NOT_FOUND") == 1
    assert value("sandboxd_rpc_seconds_count", method="CreateSandbox", code="OK") == 1
    assert value("sandboxd_rpc_seconds_count", method="Exec", code="NOT_FOUND") == 1
    assert value("sandboxd_stream_bytes_total", kind="process", direction="from_guest") >= 2
    assert not [sample for sample in samples if any("sbx-" in word for word in sample.labels.values())]
