"""The egress process against no proxy at all and against mitmproxy doing the same, in turns, on the same route.

Three guests without VMs (`tests.support.netguest`), each on a sandbox's real network: one that is open, so that the
kernel routes it out by NAT; one that only names decide for, so that all goes through our process; and one that is
open with its TCP redirected to a mitmdump in the sandbox's namespace. Emulated guests would be slower than any proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from agent.common.model import SecretSpec
from agent.common.policy.rules import parse_rule
from tests.support.internet import internet, zone
from tests.support.internet.internet import Internet
from tests.support.netguest import Guest, guest_net
from tests.tools.bench.egress_ends import BYTE_PORT, STREAM_PORT, TLS_PORT
from tests.tools.bench.figures import Better, Figure, Range
from tests.tools.bench.harness import Report

MITMPROXY = "mitmproxy==11.0.2"  # the last one for Python 3.11
_MITM_PORT = 8080
_READY_S = 60.0
NAME = "web.example"
FIGURES: tuple[Figure, ...] = (
    Figure("splice_vs_mitmproxy", "ratio", "rate of one spliced connection, over mitmproxy's", Better.HIGHER),
    Figure("splice_vs_direct", "ratio", "rate of one spliced connection, over a routed one's", Better.HIGHER),
    Figure("intercept_vs_mitmproxy", "ratio", "rate of an opened HTTPS connection, over mitmproxy's", Better.HIGHER),
    Figure("intercept_vs_direct", "ratio", "rate of an opened HTTPS connection, over a routed one's", Better.HIGHER),
    Figure("conns_vs_mitmproxy", "ratio", "new connections per second, over mitmproxy's", Better.HIGHER),
    Figure(
        "added_latency_ms", "ms", "a connection with one byte there and back, less a direct one",
        range=Range.DIFFERENCE,
    ),
    Figure(
        "added_round_trip_ms", "ms", "one byte there and back on an open connection, less a direct one",
        range=Range.DIFFERENCE,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What one round moves through each way."""

    stream_bytes: int
    tls_bytes: int
    connections: int
    round_trips: int


_SIZES = _Sizes(stream_bytes=512 << 20, tls_bytes=128 << 20, connections=300, round_trips=500)
_SLOW_SIZES = _Sizes(stream_bytes=64 << 20, tls_bytes=32 << 20, connections=60, round_trips=500)  # for mitmproxy
_SMALL_SIZES = _Sizes(stream_bytes=8 << 20, tls_bytes=4 << 20, connections=10, round_trips=20)


def _measured(namespace: str, *words: str) -> dict[str, float]:
    command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "tests.tools.bench.egress_ends", *words]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout))


@asynccontextmanager
async def _server(net: Internet) -> AsyncIterator[None]:
    words = ["serve", str(net.directory / "server.pem"), str(net.directory / "server.key")]
    process = await asyncio.create_subprocess_exec(
        "ip", "netns", "exec", net.namespace, sys.executable, "-m", "tests.tools.bench.egress_ends", *words,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        await process.stdout.readline()
        yield
    finally:
        process.kill()
        await process.wait()


@contextmanager
def _mitmdump(sandbox: str, net: Internet) -> Iterator[Path]:
    """Runs mitmdump in a sandbox's namespace, whose guest's TCP is redirected to it; yields its directory."""
    rules = f"""
table ip mitm {{
  chain to_it {{
    type nat hook prerouting priority dstnat;
    iifname "tap0" meta l4proto tcp redirect to :{_MITM_PORT}
  }}
}}
insert rule inet egress input iifname "tap0" tcp dport {_MITM_PORT} accept
"""
    subprocess.run(["ip", "netns", "exec", sandbox, "nft", "-f", "-"], check=True, input=rules.encode())
    with tempfile.TemporaryDirectory() as directory, open(f"{directory}/log", "wb") as out:
        words = [
            "mitmdump", "-q", "--mode", "transparent", "--listen-port", str(_MITM_PORT), "--set",
            f"confdir={directory}", "--set", f"ssl_verify_upstream_trusted_ca={net.ca_file}", "--set",
            "stream_large_bodies=1", "--set", "connection_strategy=lazy",
            "--tcp-hosts", rf":({BYTE_PORT}|{STREAM_PORT})$",
        ]  # fmt: skip
        run = ["uv", "run", "--quiet", "--isolated", "--no-project", "--with", MITMPROXY]
        subprocess.run([*run, "mitmdump", "--version"], check=True, stdout=out)  # fetches it: there, nothing can be
        command = ["ip", "netns", "exec", sandbox, *run, "--offline", *words]
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        try:
            yield Path(directory)
        finally:
            os.killpg(process.pid, 9)
            process.wait()


async def _until_it_answers(guest: Guest) -> None:
    async with asyncio.timeout(_READY_S):
        while True:
            with contextlib.suppress(OSError, TimeoutError):
                sock = await guest.connect(zone.WEB, BYTE_PORT, timeout_s=2.0)
                with sock:
                    await asyncio.get_running_loop().sock_sendall(sock, b"x")
                    async with asyncio.timeout(2):
                        if await asyncio.get_running_loop().sock_recv(sock, 1) == b"x":
                            return
            await asyncio.sleep(0.5)


async def measure(report: Report) -> None:
    """Measure the three ways in turns; see FIGURES."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    report.machine = {"cores": os.cpu_count(), "kernel": platform.release(), "mitmproxy": MITMPROXY[11:]}
    secret = SecretSpec("KEY", (parse_rule(f"{NAME}:{TLS_PORT}"),), "sbx_secret_0123456789", redact=False)
    with internet.running() as net:
        async with guest_net(net, connections=0) as networks, _server(net):
            direct = await networks.guest(None)
            ours = await networks.guest([NAME], secrets={"KEY": (secret, "value-0123456789")})
            theirs = await networks.guest(None)
            await ours.resolve(NAME)
            order = await networks.secrets.trust_fields(ours.record.id, ours.record.secrets)
            assert order is not None
            our_ca = net.directory / "ours.pem"
            our_ca.write_text(str(order["certificate"]))
            with _mitmdump(theirs.record.id, net) as directory:
                await _until_it_answers(theirs)
                their_ca = directory / "mitmproxy-ca-cert.pem"
                for _ in range(report.rounds):
                    await asyncio.to_thread(
                        _round, report, {"direct": direct, "sandboxd": ours, "mitmproxy": theirs},
                        {"direct": net.ca_file, "sandboxd": str(our_ca), "mitmproxy": str(their_ca)},
                    )  # fmt: skip
    _conclude(report)


def _round(report: Report, guests: dict[str, Guest], ca_files: dict[str, str]) -> None:
    for who, guest in guests.items():
        sizes = _SMALL_SIZES if report.small else _SLOW_SIZES if who == "mitmproxy" else _SIZES
        address, namespace = zone.WEB, guest.namespace
        conns = _measured(namespace, "connections", address, str(sizes.connections))
        report.add(f"connection and one byte, {who}, ms", conns["ms"])
        report.add(f"connections, {who}, per s", conns["per_s"])
        trips = _measured(namespace, "round_trips", address, str(sizes.round_trips))
        report.add(f"round trip, {who}, ms", trips["ms"])
        streamed = _measured(namespace, "stream", address, str(sizes.stream_bytes))
        report.add(f"stream, {who}, MiB/s", streamed["mib_s"])
        opened = _measured(namespace, "web", address, NAME, ca_files[who], str(sizes.tls_bytes))
        report.add(f"HTTPS, {who}, MiB/s", opened["mib_s"])


def _conclude(report: Report) -> None:
    def ratio(series: str, other: str) -> float:
        return report.median(series.format("sandboxd")) / report.median(series.format(other))

    report.figures["splice_vs_mitmproxy"] = ratio("stream, {}, MiB/s", "mitmproxy")
    report.figures["splice_vs_direct"] = ratio("stream, {}, MiB/s", "direct")
    report.figures["intercept_vs_mitmproxy"] = ratio("HTTPS, {}, MiB/s", "mitmproxy")
    report.figures["intercept_vs_direct"] = ratio("HTTPS, {}, MiB/s", "direct")
    report.figures["conns_vs_mitmproxy"] = ratio("connections, {}, per s", "mitmproxy")
    added = "connection and one byte, {}, ms"
    report.figures["added_latency_ms"] = report.median(added.format("sandboxd")) - report.median(added.format("direct"))
    trip = "round trip, {}, ms"
    report.figures["added_round_trip_ms"] = report.median(trip.format("sandboxd")) - report.median(
        trip.format("direct")
    )
