"""The egress process and the policy under way: killed, restarted, changed, while a real VM has traffic."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from agent.common.model import SecretSpec
from agent.common.policy.rules import parse_rule
from agent.daemon.network.egress import supervisor
from sandboxd.v1 import sandbox_pb2 as pb
from tests.support.daemon import AGENT, Daemon, connected, daemon_with, refused, start_daemon
from tests.support.egress import Box, policy
from tests.support.internet import zone
from tests.support.internet.internet import Internet
from tests.support.internet.zone import EVIL, WEB
from tests.support.netguest import guest_net
from tests.tools.reliability import Reliability

pytestmark = pytest.mark.vm

ECHO = f"web.example:{zone.ECHO_PORT}"


def egress_pid(daemon: Daemon) -> int:
    return int(json.loads((daemon.run_dir / "egress.json").read_text())["pid"])


async def test_killed_under_traffic_it_fails_closed_and_comes_back(
    internet: Internet, directory: Path, reliability: Reliability
) -> None:
    with daemon_with(directory, **internet.settings()) as daemon:
        async with connected(daemon) as client:
            secrets = {"KEY": pb.Secret(value="v" * 20, hosts=["web.example"])}
            async with client.sandbox(network=policy(["web.example", ECHO]), secrets=secrets) as sandbox:
                box = Box(client, sandbox.id, internet)
                await box.prepare()
                await _kill_under_traffic(box, daemon)
    reliability.seen(
        "SIGKILL of sandboxd-egress under traffic",
        "nothing passes while it is away; it comes back with the same policies and secrets",
        "so: nothing that is not allowed was reached",
    )


async def _kill_under_traffic(box: Box, daemon: Daemon) -> None:
    internet, before = box.internet, egress_pid(daemon)
    running = asyncio.create_task(
        box.probe(
            """
            resolve('web.example')
            sock = connect(web, 7000)
            sent, start = 0, time.monotonic()
            while time.monotonic() - start < 60:              # until it is cut
                try:
                    sock.sendall(b'x' * 10000)
                    if not sock.recv(100000):
                        break
                    sent += 1
                except OSError as error:
                    break
            cut = time.monotonic() - start
            tried = []
            while time.monotonic() - start < 60:
                tried.append([http(evil, 'evil.example'), tls(evil, 443), fetch('https://web.example/')])
                if tried[-1][-1] == [200, 'hello\\n']:
                    return [sent, cut, time.monotonic() - start, tried]
            return [sent, cut, None, tried]
            """,
            timeout_s=120, web=WEB, evil=EVIL,
        )
    )  # fmt: skip
    await asyncio.sleep(1.0)
    mark = internet.mark()
    os.kill(before, signal.SIGKILL)
    sent, cut, back, tried = await running
    assert sent > 0
    assert cut < 60  # by the kill, and not because the guest's own time was over
    assert back is not None, tried
    assert all("200" not in answer for row in tried for answer in row[:2])
    assert {target for _, target, _ in internet.reached(mark)} <= {WEB, zone.WEB6}
    assert egress_pid(daemon) != before
    # Secrets and policy are as they were.
    mark = internet.mark()
    key = (await box.get()).secrets["KEY"].placeholder
    await box.probe("return fetch('https://web.example/headers', {'X-Key': key})", key=key)
    assert dict(internet.since(mark, "http")[0]["headers"])["x-key"] == "v" * 20


async def test_it_is_nobody_and_may_do_nothing(net_daemon: Daemon) -> None:
    text = await asyncio.to_thread(Path(f"/proc/{egress_pid(net_daemon)}/status").read_text)
    status = dict(line.split(":\t", 1) for line in text.splitlines())
    assert set(status["Uid"].split()) == {"65534"}
    assert set(status["Gid"].split()) == {"65534"}
    assert status["Groups"].strip() == ""
    assert all(int(status[name], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"))
    assert status["NoNewPrivs"] == "1"


@pytest.fixture
def unreadable_code(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the egress process run from a checkout below a directory of mode 0700, as /root is on Debian.

    The mounts are in a namespace of the process's own, and end with it.
    """
    closed = directory / "closed"
    closed.mkdir(mode=0o700)
    mounts = {Path(__file__).parents[2]: closed / "code", Path(sys.prefix): closed / "venv"}
    lines = ["#!/bin/sh -e", 'test -n "$IN_OWN_NAMESPACE" || IN_OWN_NAMESPACE=1 exec unshare --mount "$0" "$@"']
    for source, target in mounts.items():
        target.mkdir()
        lines.append(shlex.join(["mount", "--bind", str(source), str(target)]))
    lines += [f"cd {shlex.quote(str(closed / 'code'))}", f'exec {shlex.quote(str(closed / "venv/bin/python"))} "$@"']
    script = directory / "python"
    script.write_text("\n".join(lines) + "\n")
    script.chmod(0o755)
    monkeypatch.setattr(supervisor, "sys", SimpleNamespace(executable=str(script)))


@pytest.mark.usefixtures("unreadable_code")
async def test_it_needs_no_code_once_it_is_nobody(internet: Internet) -> None:
    """A lookup, an opened connection, and a name that is not ASCII each use code of a library's own choice."""
    secret = SecretSpec("KEY", (parse_rule("web.example"),), "sbx_secret_0123456789", redact=False)
    async with guest_net(internet) as net:
        guest = await net.guest(["web.example", "bücher.example"], secrets={"KEY": (secret, "v" * 20)})
        pid = int(json.loads((net.directory / "run" / "egress.json").read_text())["pid"])
        assert os.readlink(f"/proc/{pid}/cwd").endswith("/closed/code")
        assert await guest.resolve("web.example") == [WEB]
        assert await guest.resolve("xn--bcher-kva.example") == ["45.0.0.13"]
        order = await net.secrets.trust_fields(guest.record.id, guest.record.secrets)
        assert order is not None
        trusted = guest.trust(internet, str(order["certificate"]))
        reader, writer = await guest.open("web.example", 443, tls=trusted)
        writer.write(b"GET / HTTP/1.1\r\nHost: web.example\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_a_change_of_policy_ends_what_it_does_not_allow(box: Box) -> None:
    await box.allow("web.example", "smtp.example", ECHO, "api.example:80")
    running = asyncio.create_task(
        box.probe(
            """
            import threading
            resolve('web.example'), resolve('smtp.example'), resolve('api.example')
            kept, cut = connect('45.0.0.21', 25, 40), connect(web, 7000, 40)
            stream = connect(api, 80, 40)
            stream.sendall(request('api.example', '/sse?n=200&pause=0.2'))
            kept.recv(100)
            start = time.monotonic()
            ended = {}
            def watch(name, sock, send):
                try:
                    while time.monotonic() - start < 30:
                        if send:
                            sock.sendall(send)
                        if not sock.recv(10000):
                            break
                        time.sleep(0.1)
                except OSError as error:
                    pass
                ended[name] = time.monotonic() - start
            threads = [threading.Thread(target=watch, args=args, daemon=True) for args in
                       (('cut', cut, b'hello'), ('stream', stream, b''))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(35)
            kept.sendall(b'NOOP\\r\\n')
            return [ended, kept.recv(100)]
            """,
            web=WEB, api=zone.API,
        )
    )  # fmt: skip
    await asyncio.sleep(2.0)
    async with box.denied("policy_changed"):
        await box.allow("smtp.example")
        ended, kept = await running
    assert set(ended) == {"cut", "stream"}
    assert all(seconds < 20 for seconds in ended.values())
    assert kept.startswith("250")
    async with box.denied("dns_not_allowed"):
        await box.probe("return fetch('http://web.example/')")


async def test_an_open_network_that_is_closed_ends_its_connections(box: Box, internet: Internet) -> None:
    await box.open()
    running = asyncio.create_task(
        box.probe(
            """
            sock = connect(evil, 7000, 40)
            start = time.monotonic()
            try:
                while time.monotonic() - start < 30:
                    sock.sendall(b'hello')
                    if not sock.recv(100):
                        break
                    time.sleep(0.1)
            except OSError:
                pass
            return time.monotonic() - start
            """,
            evil=EVIL,
        )
    )
    await asyncio.sleep(1.5)
    await box.allow("web.example")
    assert await running < 20
    # And opened again, what the proxy carries goes on.
    assert await box.probe("return fetch('https://web.example/')") == [200, "hello\n"]
    await box.open()
    assert await box.probe("return fetch('https://evil.example/')") == [200, "hello\n"]


async def test_policies_that_are_wrong_are_refused(box: Box) -> None:
    for rule in ("https://web.example", "web.example:0", "*", "we b.example", "[1.2.3.4]", "1.2.3", "web.example:http"):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC"):
            await box.allow(rule)


async def test_denials_are_events(box: Box) -> None:
    await box.allow("web.example")
    watch = box.client.sandboxes.WatchSandboxes(pb.WatchSandboxesRequest(id=box.id))

    async def denial() -> pb.Denial:
        async for event in watch:
            if event.type == pb.SandboxEvent.TYPE_DENIED:
                return event.denial
        raise AssertionError("the watch ended")

    waiting = asyncio.create_task(denial())
    await asyncio.sleep(0.3)
    await box.probe("return https(web, 'evil.example')", web=WEB)
    async with asyncio.timeout(10):
        found = await waiting
    watch.cancel()
    assert (found.reason, found.host, found.port, found.protocol) == ("host_not_allowed", "evil.example", 443, "tls")
    assert found.count >= 1


async def test_an_agent_that_is_killed_leaves_the_network_in_force(
    internet: Internet, directory: Path, reliability: Reliability
) -> None:
    first = start_daemon(directory, **internet.settings(), sandbox__on_stop="keep")
    try:
        async with connected(first) as client:
            request = pb.CreateSandboxRequest(memory_bytes=256 << 20, network=policy(["web.example"]))
            request.secrets["KEY"].CopyFrom(pb.Secret(value="w" * 20, hosts=["web.example"]))
            made = await client.sandboxes.CreateSandbox(request)
            box = Box(client, made.id, internet)
            await box.prepare()
            watching = asyncio.create_task(_cross_restart(box))
            await asyncio.sleep(1)
        pid = egress_pid(first)
        first.kill()
        await asyncio.gather(watching, return_exceptions=True)
        with daemon_with(directory, **internet.settings()) as second:
            assert egress_pid(second) == pid
            async with connected(second) as client:
                box = Box(client, made.id, internet)
                key = made.secrets["KEY"].placeholder
                mark = internet.mark()
                assert (await box.probe("return fetch('https://web.example/', {'X-Key': key})", key=key))[0] == 200
                assert dict(internet.since(mark, "http")[0]["headers"])["x-key"] == "w" * 20
                async with box.denied("dns_not_allowed"):
                    await box.probe("return fetch('https://evil.example/')")
                await box.allow("api.example")
                assert (await box.probe("return fetch('http://api.example/')"))[0] == 200
    finally:
        if first.process.poll() is None:
            first.kill()
    reliability.seen(
        "SIGKILL of the agent under traffic",
        "policies, secrets and connections go on; the next agent takes them over",
        "so, with the same egress process",
    )


async def _cross_restart(box: Box) -> None:
    await box.probe("resolve('web.example'); return fetch('https://web.example/sse?n=40&pause=0.1')")


async def test_what_the_operator_sets_comes_first(internet: Internet, directory: Path) -> None:
    settings: dict[str, Any] = {
        **internet.settings(),
        "egress__deny": "evil.example,45.0.0.11",
        "egress__always": "six.example",
        "egress__permit_private": "10.1.2.0/24",
        "egress__connections": "3",
        "egress__connections_per_s": "20",
    }
    config = directory / "config.toml"
    config.write_text('[egress.tenants]\nacme = "*.example:443, 10.1.2.0/24"\n')
    with daemon_with(directory, argv=(*AGENT, "--config", str(config)), **settings) as daemon:
        async with connected(daemon) as client, client.sandbox(tenant="acme", network=policy(None)) as sandbox:
            box = Box(client, sandbox.id, internet)
            await box.prepare()
            reaches = [(6, WEB, 443), (6, zone.WEB6, 443), (6, "2a0a:1::14", 443)]
            async with box.denied("denied_by_operator", "port_not_allowed", "dns_not_allowed", reaches=reaches):
                said = await box.probe(
                    """
                    return [resolve('evil.example'), https(web, 'evil.example'), fetch('https://six.example/'),
                            fetch('https://web.example/'), http(web, 'web.example'), tcp(api, 443, b'x')]
                    """,
                    web=WEB, api=zone.API,
                )  # fmt: skip
            assert [answer for answer in said if answer == [200, "hello\n"]] == [[200, "hello\n"]] * 2
            await box.update(policy(["private.example", "10.1.2.3"]))
            assert sandbox.tenant == (await box.get()).tenant == "acme"
            async with box.denied("too_many_connections", reaches=[(6, zone.PRIVATE, 443)]):
                said = await box.probe(
                    """
                    held = []
                    for _ in range(6):
                        try:
                            held.append(connect(private, 443))
                            held[-1].settimeout(0.3)
                        except OSError:
                            pass
                    time.sleep(1)
                    return len(held)
                    """,
                    private=zone.PRIVATE,
                )


async def test_bandwidth_and_new_connections_are_limited(internet: Internet, directory: Path) -> None:
    settings: dict[str, Any] = {**internet.settings(), "egress__bytes_per_s": "1MiB", "egress__connections_per_s": "5"}
    with daemon_with(directory, **settings) as daemon:
        async with connected(daemon) as client, client.sandbox(network=policy(["web.example"])) as sandbox:
            box = Box(client, sandbox.id, internet)
            await box.prepare()
            start = time.monotonic()
            async with box.denied("rate_dropped", reaches=[(6, WEB, 80), (6, WEB, 443)]):
                said = await box.probe(
                    """
                    size = len(http(web, 'web.example', '/stream?n=4194304'))
                    many = sum(tls(web, 443, 'web.example') == 'connected' for _ in range(1))
                    socks = []
                    for _ in range(60):
                        sock = socket.socket()
                        sock.setblocking(False)
                        sock.connect_ex((web, 443))
                        socks.append(sock)
                    return [resolve('web.example'), size, many]
                    """,
                    web=WEB,
                )
            assert said[1] > 4 << 20
            assert time.monotonic() - start > 3  # 4 MiB at 1 MiB/s, less what may come at once
