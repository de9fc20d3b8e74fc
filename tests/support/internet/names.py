"""The authoritative servers and the recursive resolver of the test internet, as one: DNS over UDP and TCP."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address
from typing import cast

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from tests.support.internet import zone
from tests.support.internet.log import Log

TTL_S = 30


class Names:
    """Answers from the zone, and notes every question."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._rebound: dict[str, int] = {}

    def answer(self, data: bytes, transport: str) -> bytes:
        query = dns.message.from_wire(data)
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True).lower()
        self._log.note("dns", name=name, type=dns.rdatatype.to_text(question.rdtype), transport=transport)
        response = dns.message.make_response(query, recursion_available=True)
        found = self._records(name, question.rdtype)
        if found is None:
            response.set_rcode(dns.rcode.NXDOMAIN)
        else:
            response.answer += found
        if transport == "udp":
            try:
                return response.to_wire(max_size=512 if query.edns < 0 else query.payload)
            except dns.exception.TooBig:
                response.answer.clear()
                response.flags |= dns.flags.TC
        return response.to_wire()

    def _records(self, name: str, kind: dns.rdatatype.RdataType) -> list[dns.rrset.RRset] | None:
        if name.endswith(".long.example"):  # more than a datagram takes
            addresses = [f"45.1.{index // 250}.{index % 250 + 1}" for index in range(200)]
            return _addresses(name, kind, addresses)
        if name == zone.REBINDING:
            turn = self._rebound.get(name, 0)
            if kind == dns.rdatatype.A:
                self._rebound[name] = turn + 1
            return _addresses(name, kind, [zone.REBINDING_ADDRESSES[min(turn, 1)]], ttl_s=0)
        value = zone.ZONE.get(name)
        if value is None:
            return None
        if isinstance(value, str):
            alias = dns.rrset.from_text(name + ".", TTL_S, "IN", "CNAME", value + ".")
            return [alias, *(self._records(value, kind) or [])]
        if kind == dns.rdatatype.HTTPS and name == zone.SERVICE:
            text = f'1 . alpn="h3,h2" ech="AAR0ZXN0" ipv4hint={zone.PRIVATE} port=443'
            return [dns.rrset.from_text(name + ".", TTL_S, "IN", "HTTPS", text)]
        if kind == dns.rdatatype.TXT and name == zone.SERVICE:
            return [dns.rrset.from_text(name + ".", TTL_S, "IN", "TXT", '"hello"')]
        return _addresses(name, kind, value)


def _addresses(
    name: str, kind: dns.rdatatype.RdataType, addresses: list[str], ttl_s: int = TTL_S
) -> list[dns.rrset.RRset]:
    version = {dns.rdatatype.A: 4, dns.rdatatype.AAAA: 6}.get(kind)
    fitting = [address for address in addresses if ip_address(address).version == version]
    return [dns.rrset.from_text_list(name + ".", ttl_s, "IN", kind, fitting)] if fitting else []


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, names: Names) -> None:
        self._names = names

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._transport.sendto(self._names.answer(data, "udp"), addr)


async def serve(log: Log) -> None:
    """Begins to serve on the resolver's address."""
    names = Names(log)

    async def over_tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(2), "big")
                answer = names.answer(await reader.readexactly(size), "tcp")
                writer.write(len(answer).to_bytes(2, "big") + answer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            writer.close()

    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(lambda: _Udp(names), (zone.RESOLVER, 53))
    await asyncio.start_server(over_tcp, zone.RESOLVER, 53)
