"""Prometheus metrics of the gateway.

No label holds a sandbox or an organization: a time series would outlive each of them.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

registry = CollectorRegistry()
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

CALL_SECONDS = Histogram(
    "sandboxd_gateway_call_seconds", "Duration of JSON-RPC calls, from request to response", ["method", "outcome"],
    buckets=_BUCKETS, registry=registry,
)  # fmt: skip
CALLS_OPEN = Gauge("sandboxd_gateway_calls_open", "JSON-RPC calls in progress", registry=registry)
CONNECTIONS = Gauge("sandboxd_gateway_connections", "Open WebSockets", registry=registry)
BYTES = Counter(
    "sandboxd_gateway_bytes", "Bytes of WebSocket messages received and sent", ["direction"], registry=registry
)
REFUSALS = Counter(
    "sandboxd_gateway_refusals", "HTTP requests that were answered with an error, by code", ["code"], registry=registry
)
BACKGROUND_FAILURES = Counter(
    "sandboxd_gateway_background_failures", "Failures of background loops, which are restarted", ["loop"],
    registry=registry,
)  # fmt: skip
BACKGROUND_FAILING = Gauge(
    "sandboxd_gateway_background_failing", "1 while a background loop fails and has not recovered", ["loop"],
    registry=registry,
)  # fmt: skip
INGRESS_CONNECTIONS = Counter(
    "sandboxd_gateway_ingress_connections",
    "TLS connections to exposed ports, by protocol and outcome",
    ["protocol", "outcome"],
    registry=registry,
)
