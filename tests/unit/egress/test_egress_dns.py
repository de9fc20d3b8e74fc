"""Answers to guests, pins, and the resolver against a server of the test's own."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any

import dns.edns
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from agent.common.policy.policy import Policy
from agent.common.policy.rules import parse_rules
from agent.egress.dns import dns_answers
from agent.egress.dns.resolver import BlockedAnswer, ResolveError, Resolver
from agent.egress.dns.server import DnsServer
from agent.egress.dns_pins import DnsPins
from agent.egress.report import Reporter
from agent.egress.sandbox_state import SandboxState

OPEN = Policy()
Script = Callable[[dns.message.Message, str], dns.message.Message | None]


class _Server(asyncio.DatagramProtocol):
    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[str] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        name = query.question[0].name.to_text(omit_final_dot=True)
        self.asked.append(name)
        answer = self.script(query, name)
        if answer is not None:
            self.transport.sendto(answer.to_wire(), addr)


@asynccontextmanager
async def resolver(script: Script, **options: Any) -> AsyncIterator[tuple[Resolver, _Server]]:
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(lambda: _Server(script), ("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]
    made = Resolver([f"127.0.0.1:{port}"], **options)
    try:
        yield made, server
    finally:
        await made.aclose()
        transport.close()


def zone(**records: list[str]) -> Script:
    """Answers A and AAAA for names of one label below example; an entry that is a name is an alias."""

    def script(query: dns.message.Message, name: str) -> dns.message.Message:
        response = dns.message.make_response(query, recursion_available=True)
        values = records.get(name.partition(".")[0])
        if values is None:
            response.set_rcode(dns.rcode.NXDOMAIN)
            return response
        kind = query.question[0].rdtype
        owner = query.question[0].name
        for value in values:
            if value.endswith("."):
                response.answer.append(dns.rrset.from_text(owner, 60, "IN", "CNAME", value))
                owner = dns.rrset.from_text(value, 60, "IN", "A", "1.1.1.1").name
            elif (":" in value) == (kind == dns.rdatatype.AAAA) and kind in dns_answers.ADDRESS_TYPES:
                response.answer.append(dns.rrset.from_text(owner, 60, "IN", kind, value))
        return response

    return script


async def test_addresses_of_both_families_without_blocked_ones() -> None:
    script = zone(web=["45.0.0.1", "10.0.0.1", "2a0a::1"], alias=["other.example.", "45.0.0.2"], private=["127.0.0.1"])
    async with resolver(script) as (made, server):
        found = await made.addresses("web.example", OPEN)
        assert set(map(str, found.addresses)) == {"45.0.0.1", "2a0a::1"}
        assert 50 < found.ttl_s <= 60
        assert [str(address) for address in (await made.addresses("alias.example", OPEN)).addresses] == ["45.0.0.2"]
        with pytest.raises(BlockedAnswer):
            await made.addresses("private.example", OPEN)
        with pytest.raises(ResolveError, match="nxdomain"):
            await made.addresses("nobody.example", OPEN)
        asked = len(server.asked)
        await made.addresses("web.example", OPEN)
        assert len(server.asked) == asked  # remembered


async def test_one_lookup_for_all_who_ask_at_once() -> None:
    async with resolver(zone(web=["45.0.0.1"])) as (made, server):
        await asyncio.gather(*(made.addresses_of_type("web.example", dns.rdatatype.A, OPEN) for _ in range(50)))
        assert server.asked == ["web.example"]


async def test_silence_and_nonsense() -> None:
    async with resolver(lambda query, name: None, timeout_s=0.05, attempts=2) as (made, server):
        with pytest.raises(ResolveError, match="timeout"):
            await made.addresses("web.example", OPEN)
        assert len(server.asked) == 4

    def other_name(query: dns.message.Message, name: str) -> dns.message.Message:
        wrong = dns.message.make_query("evil.example", query.question[0].rdtype)
        wrong.id = query.id
        return dns.message.make_response(wrong)

    async with resolver(other_name, timeout_s=0.05, attempts=1) as (made, _):
        with pytest.raises(ResolveError):
            await made.addresses("web.example", OPEN)
    with pytest.raises(ResolveError, match="servfail"):
        await Resolver([]).addresses("web.example", OPEN)


@asynccontextmanager
async def served(script: Script, policy: Policy) -> AsyncIterator[tuple[SandboxState, tuple[str, int], _Server]]:
    async with resolver(script) as (made, server):
        sandbox = SandboxState("sbx-0000000000000000", policy, Reporter())
        udp, tcp = socket.socket(type=socket.SOCK_DGRAM), socket.socket()
        udp.bind(("127.0.0.1", 0))
        tcp.bind(udp.getsockname())
        tcp.listen()
        for sock in (udp, tcp):
            sock.setblocking(False)
        address = udp.getsockname()
        dns_server = DnsServer(sandbox, made)
        dns_server.start([udp], [tcp])
        try:
            yield sandbox, address, server
        finally:
            await dns_server.aclose()


async def ask(address: tuple[str, int], data: bytes) -> bytes | None:
    loop = asyncio.get_running_loop()
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        await loop.sock_sendto(sock, data, address)
        try:
            async with asyncio.timeout(1):
                return await loop.sock_recv(sock, 65535)
        except TimeoutError:
            return None


async def test_only_allowed_names_are_looked_up_and_pinned() -> None:
    policy = Policy(allow=parse_rules(["web.example"], "x"))
    async with served(zone(web=["45.0.0.1"], evil=["45.0.0.2"]), policy) as (sandbox, address, server):
        for name, code, count in (("WEB.example", dns.rcode.NOERROR, 1), ("evil.example", dns.rcode.NXDOMAIN, 0)):
            query = dns.message.make_query(name, "A", use_edns=0)
            data = await ask(address, query.to_wire())
            assert data is not None
            answer = dns.message.from_wire(data)
            assert (answer.id, answer.rcode(), len(answer.answer)) == (query.id, code, count)
        assert answer.extended_errors()[0].code == dns.edns.EDECode.PROHIBITED
        assert server.asked == ["web.example"]
        assert sandbox.pins.names(ip_address("45.0.0.1")) == ("web.example",)
        assert sandbox.reporter.counts == {(sandbox.id, "dns_not_allowed"): 1}


async def test_messages_that_are_no_questions() -> None:
    policy = Policy(allow=parse_rules(["web.example"], "x"))
    query = dns.message.make_query("web.example", "A")
    async with served(zone(web=["45.0.0.1"]), policy) as (sandbox, address, _):
        assert await ask(address, b"\0") is None
        assert await ask(address, dns.message.make_response(query).to_wire()) is None
        notify = bytearray(query.to_wire())
        notify[2] |= 0x20
        for data, code in ((bytes(notify), 4), (query.to_wire()[:14], 1), (query.to_wire() + b"junk", 1)):
            answer = await ask(address, data)
            assert answer is not None
            assert (answer[:2], answer[3] & 15) == (data[:2], code)
        assert sandbox.reporter.counts == {(sandbox.id, "dns_malformed"): 5}


async def test_over_tcp_questions_come_one_after_the_other() -> None:
    policy = Policy(allow=parse_rules(["web.example"], "x"))
    async with served(zone(web=["45.0.0.1"]), policy) as (_, address, _server):
        reader, writer = await asyncio.open_connection(*address)
        for _ in range(3):
            data = dns.message.make_query("web.example", "A").to_wire()
            writer.write(len(data).to_bytes(2, "big") + data)
            size = int.from_bytes(await reader.readexactly(2), "big")
            assert dns.message.from_wire(await reader.readexactly(size)).answer
        writer.close()


def test_a_long_answer_is_cut_over_udp() -> None:
    question = dns_answers.parse(dns.message.make_query("web.example", "A").to_wire())
    response = dns_answers.with_addresses(question, [f"45.0.{part}.1" for part in range(200)], 10)
    cut = dns.message.from_wire(dns_answers.to_wire(question, response, udp=True))
    assert (cut.flags & dns.flags.TC, cut.answer) == (dns.flags.TC, [])
    assert len(dns.message.from_wire(dns_answers.to_wire(question, response, udp=False)).answer[0]) == 200


def test_pins_are_held_and_forgotten() -> None:
    now = 0.0
    pins = DnsPins(max_pins=3, min_hold_s=10, clock=lambda: now)
    one, two = ip_address("45.0.0.1"), ip_address("45.0.0.2")
    pins.pin("a", [one], 1)
    pins.pin("b", [one, two], 100)
    assert pins.names(one) == ("b", "a")
    assert pins.addresses("b") == (two, one)
    now = 11.0
    assert (pins.names(one), pins.has("a", one), pins.has("b", two)) == (("b",), False, True)
    pins.pin("c", [two], 1)
    assert len(pins) == 3  # the oldest went
    assert pins.names(two) == ("c", "b")
    assert not pins.has("a", one)


def test_no_code_is_loaded_after_privileges_are_dropped() -> None:
    """The user of the egress process may not be able to read the code: the clone may lie in /root."""
    script = """
import asyncio, socket, sys
import dns.message, dns.rdatatype
from agent.common.ca import LocalCa
from agent.egress import __main__ as egress
from agent.egress.dns.resolver import Resolver
from agent.common.policy.hosts import normalise

async def look_up():
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.setblocking(False)
    resolver = Resolver([f"127.0.0.1:{sock.getsockname()[1]}"])
    asking = asyncio.create_task(resolver.query("a.example", dns.rdatatype.TXT))
    data, peer = await asyncio.get_running_loop().sock_recvfrom(sock, 4096)
    answer = dns.message.make_response(dns.message.from_wire(data))
    answer.answer.append(dns.rrset.from_text("a.example.", 60, "IN", "TXT", "x"))
    sock.sendto(answer.to_wire(), peer)
    records, _ = await asking
    assert [str(record) for record in records] == ['"x"'], records
    await resolver.aclose()

asyncio.run(asyncio.sleep(0))
egress._load_all()
loaded = set(sys.modules)
asyncio.run(look_up())
LocalCa.generate("x").context("a.example", ("h2",))
normalise("bücher.example")
print(sorted(set(sys.modules) - loaded))
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")
