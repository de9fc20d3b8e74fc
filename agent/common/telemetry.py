"""Logs, metrics and trace spans. All are no-ops until `setup` turns them on, so that callers need no checks.

Metrics never have a label per sandbox: each value of a label is a time series that stays for ever.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Thread
from wsgiref.simple_server import WSGIServer

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from agent.common.config.addresses import split_address
from agent.common.config.daemon import LogSettings, MetricsSettings, TracingSettings
from agent.common.errors import AgentError

registry = CollectorRegistry()
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

PHASE_SECONDS = Histogram(
    "sandboxd_phase_seconds", "Duration of each named step of creates and deletes, in seconds", ["phase"],
    buckets=_BUCKETS, registry=registry,
)  # fmt: skip
RPC_SECONDS = Histogram(
    "sandboxd_rpc_seconds", "Duration of RPCs until their last byte, in seconds", ["method", "code"],
    buckets=_BUCKETS, registry=registry,
)  # fmt: skip
SANDBOXES = Gauge("sandboxd_sandboxes", "Sandboxes by state", ["state"], registry=registry)
CREATES = Counter("sandboxd_creates", "CreateSandbox calls by outcome", ["outcome"], registry=registry)
DELETES = Counter("sandboxd_deletes", "Deleted sandboxes by reason", ["reason"], registry=registry)
ERRORS = Counter("sandboxd_errors", "Errors answered to callers, by reason", ["reason"], registry=registry)
PROCESSES = Counter("sandboxd_processes_started", "Processes started in sandboxes", registry=registry)
STREAM_BYTES = Counter(
    "sandboxd_stream_bytes", "Bytes carried between clients and guests", ["kind", "direction"], registry=registry
)
TEMPLATES = Gauge("sandboxd_templates", "Templates on this node", registry=registry)
TEMPLATE_BYTES = Gauge("sandboxd_template_bytes", "Disk space used by templates, in bytes", registry=registry)
CLONE_RETRIES = Counter(
    "sandboxd_clone_retries", "Clones of templates that failed and were retried", ["reason"], registry=registry
)
EGRESS_STARTS = Counter(
    "sandboxd_egress_starts", "Egress processes started, or found running by a new agent", ["how"], registry=registry
)
EGRESS_DENIALS = Counter(
    "sandboxd_egress_denials", "Actions of sandboxes that were denied, by reason", ["reason"], registry=registry
)
RECOVERED = Counter(
    "sandboxd_recovered", "Sandboxes of an earlier agent found at start, by kind", ["kind"], registry=registry
)
STATE_REBUILT = Counter(
    "sandboxd_state_rebuilt", "Damaged state files that were rebuilt from the sandboxes' directories", registry=registry
)
VMM_OUT_OF_MEMORY = Counter(
    "sandboxd_vmm_out_of_memory", "VMMs that the host's OOM killer has ended", registry=registry
)
DEGRADED = Gauge(
    "sandboxd_degraded", "Missing features of the host that limit sandboxes; GetNode lists them", registry=registry
)
QUEUED = Gauge("sandboxd_queued_creates", "Creates that wait in the queue for capacity", registry=registry)
REFUSED = Counter(
    "sandboxd_refused", "Creates that were refused for lack of capacity, by reason", ["reason"], registry=registry
)
DRAINING = Gauge("sandboxd_draining", "1 while the node is draining", registry=registry)
BACKGROUND_FAILURES = Counter(
    "sandboxd_background_failures", "Failures of background loops, which are restarted", ["loop"], registry=registry
)
BACKGROUND_FAILING = Gauge(
    "sandboxd_background_failing", "1 while a background loop fails and has not recovered", ["loop"], registry=registry
)

log: structlog.stdlib.BoundLogger = structlog.get_logger("sandboxd")
tracer = trace.get_tracer("sandboxd")
_propagator = TraceContextTextMapPropagator()
_phases: ContextVar[list[tuple[str, float]] | None] = ContextVar("phases", default=None)


def setup(
    logs: LogSettings, metrics: MetricsSettings, tracing: TracingSettings, node: str, service: str = "sandboxd"
) -> None:
    """Configure logging, and start metrics and tracing if configured.

    :param node: name of the host in spans.
    :param service: name of the program in spans.
    :raises OSError: the address of the metrics cannot be bound.
    """
    _setup_logs(logs)
    if metrics.address:
        serve_metrics(metrics.address)
    if tracing.otlp_endpoint:
        # Imported only if needed: the import takes a quarter of the agent's start time.
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        provider = TracerProvider(resource=Resource.create({"service.name": service, "host.name": node}))
        exporter = OTLPSpanExporter(endpoint=tracing.otlp_endpoint, insecure=tracing.otlp_endpoint.startswith("http:"))
        provider.add_span_processor(BatchSpanProcessor(exporter))
        trace.set_tracer_provider(provider)


def serve_metrics(address: str) -> tuple[WSGIServer, Thread]:
    """Serve the metrics over HTTP at host:port from a thread; return the server and the thread.

    :raises OSError: the address cannot be bound.
    """
    host, port = split_address(address, "metrics.address")
    return start_http_server(port, host, registry)


def set_log_level(level: str) -> None:
    """Set the level of all log lines from now on."""
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(number))
    logging.getLogger().setLevel(max(number, logging.WARNING))


def _setup_logs(logs: LogSettings) -> None:
    level = logging.getLevelNamesMapping()[logs.level.upper()]
    console = logs.format == "console" or (logs.format == "auto" and sys.stderr.isatty())
    renderer = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.basicConfig(level=max(level, logging.WARNING), stream=sys.stderr)


class LoopTelemetry:
    """Log and metrics of background loops, with the label `loop`; see `agent.common.background.Observer`."""

    def __init__(self, failures: Counter, failing: Gauge) -> None:
        self._failures = failures
        self._failing = failing

    def on_failure(self, loop: str, error: BaseException, retry_in_s: float | None) -> None:
        """Count and log a failure, with the traceback unless the error was raised on purpose."""
        self._failures.labels(loop).inc()
        trace_of = None if isinstance(error, AgentError) else error
        retry_in_s = None if retry_in_s is None else round(retry_in_s, 2)
        log.error("background loop failed", loop=loop, error=str(error), retry_in_s=retry_in_s, exc_info=trace_of)

    def on_state(self, loop: str, *, failing: bool) -> None:
        """Set the gauge."""
        self._failing.labels(loop).set(failing)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Measure a step: open a span; add to the histogram, the debug log and the list of `collect_phases`."""
    start = time.perf_counter()
    with tracer.start_as_current_span(name):
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            note_phase(name, seconds)
            log.debug("step", step=name, ms=round(seconds * 1000, 2))


def trace_headers() -> dict[str, str]:
    """Return W3C trace-context headers for the current span, or {} without one."""
    headers: dict[str, str] = {}
    _propagator.inject(headers)
    return headers


def remote_parent(headers: Iterable[tuple[str, str | bytes]] | None) -> Context | None:
    """Return the trace context in a call's metadata (W3C Trace Context), or None without one."""
    found = {name: value for name, value in headers or () if name in _propagator.fields and isinstance(value, str)}
    return _propagator.extract(found) if found else None


def note_spans(phases: Sequence[tuple[str, float]]) -> None:
    """Record steps that were measured elsewhere, as `step` records its own.

    :param phases: (name, seconds) of consecutive steps, the last of which ends now. Names become labels of a metric, so
        they must not come from a guest.
    """
    start = time.time_ns() - round(sum(seconds for _, seconds in phases) * 1e9)
    for name, seconds in phases:
        end = start + round(seconds * 1e9)
        tracer.start_span(name, start_time=start).end(end)
        note_phase(name, seconds)
        start = end


def note_phase(name: str, seconds: float) -> None:
    """Add a step to the histogram and to the list of `collect_phases`."""
    PHASE_SECONDS.labels(name).observe(seconds)
    phases = _phases.get()
    if phases is not None:
        phases.append((name, seconds))


@contextmanager
def collect_phases() -> Iterator[list[tuple[str, float]]]:
    """Collect (name, seconds) of every `step` in the with block into the list that is yielded."""
    phases: list[tuple[str, float]] = []
    token = _phases.set(phases)
    try:
        yield phases
    finally:
        _phases.reset(token)
