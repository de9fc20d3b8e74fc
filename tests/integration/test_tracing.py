"""One create, followed from the gateway through the agent to what the guest did, at a collector of OpenTelemetry."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.support import gateway as gateways
from tests.support.daemon import daemon_with
from tests.support.rawclient import raw

pytestmark = pytest.mark.vm


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps spans: (service, span)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        self.endpoint = ""

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        for resource in request.resource_spans:
            attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
            self.spans += [(attributes["service.name"], span) for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def line_of(self, name: str) -> list[tuple[str, str]]:
        """Returns (service, name) of a span and of all that it is below, outermost first."""
        by_id = {span.span_id: (service, span) for service, span in self.spans}
        service, span = next((service, span) for service, span in self.spans if span.name == name)
        line = [(service, span.name)]
        while span.parent_span_id:
            parent_service, parent = by_id[span.parent_span_id]
            assert parent.trace_id == span.trace_id
            assert parent.start_time_unix_nano <= span.start_time_unix_nano + 1_000_000, (parent.name, span.name)
            line.insert(0, (parent_service, parent.name))
            span = parent
        return line


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    made.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield made
    server.stop(None).wait()


async def test_a_create_from_the_gateway_to_the_guest(directory: Path, collector: Collector) -> None:
    with (
        daemon_with(directory, tracing__otlp_endpoint=collector.endpoint) as daemon,
        gateways.running(daemon, directory / "gateway", image="minimal", vcpus="1") as gateway,
    ):
        async with raw(gateway) as client, client.sandbox():
            pass
    node, edge = "sandboxd", "sandboxd-gateway"
    create = [(edge, "gateway GET"), (edge, "gateway.create"), (node, "CreateSandbox"), (node, "create")]
    assert collector.line_of("create") == create
    assert collector.line_of("guest.configure") == [*create, (node, "guest.configure")]
    for phase in ("entropy", "root", "names"):
        assert collector.line_of(f"guest.{phase}") == [*create, (node, "guest.configure"), (node, f"guest.{phase}")]
    assert collector.line_of("vmm.restore") == [*create, (node, "vmm.restore")]
