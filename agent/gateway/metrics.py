"""What the gateway counts. No label is per sandbox or per organization: these come and go, time series stay."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

registry = CollectorRegistry()
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

CALL_SECONDS = Histogram(
    "sandboxd_gateway_call_seconds", "Time of JSON-RPC calls until their answer", ["method", "outcome"],
    buckets=_BUCKETS, registry=registry,
)  # fmt: skip
CALLS_OPEN = Gauge("sandboxd_gateway_calls_open", "JSON-RPC calls under way", registry=registry)
CONNECTIONS = Gauge("sandboxd_gateway_connections", "Open WebSockets", registry=registry)
BYTES = Counter("sandboxd_gateway_bytes", "Bytes of WebSocket messages", ["direction"], registry=registry)
REFUSALS = Counter("sandboxd_gateway_refusals", "Requests that were refused, by code", ["code"], registry=registry)
BACKGROUND_FAILURES = Counter(
    "sandboxd_gateway_background_failures", "Failures of background loops, which are restarted", ["loop"],
    registry=registry,
)  # fmt: skip
BACKGROUND_FAILING = Gauge(
    "sandboxd_gateway_background_failing", "1 while a background loop fails and has not recovered", ["loop"],
    registry=registry,
)  # fmt: skip
INGRESS_CONNECTIONS = Counter(
    "sandboxd_gateway_ingress_connections", "Connections to exposed ports", ["protocol", "outcome"], registry=registry
)
