"""DNS lookups from inside a sandbox: the sandbox's own resolver answers according to its egress policy."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address

import dns.exception
import dns.message
import dns.rdatatype
import grpc

from agent.common.api_client import Api
from agent.common.model import GATEWAY_IPV4
from agent.gateway.nodes.guest_stream import GuestStream

_RESOLVER = GATEWAY_IPV4.partition("/")[0]
_PORT = 53
_TIMEOUT_S = 10.0


async def resolve(api: Api, sandbox_id: str, host: str) -> str:
    """Return an IP address of a host: the first A record, else the first AAAA record.

    :raises LookupError: the host has no address that the sandbox may see, or the resolver does not answer.
    """
    try:
        return str(ip_address(host.strip("[]")))
    except ValueError:
        pass
    if host == "localhost":
        return "127.0.0.1"
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            for kind in (dns.rdatatype.A, dns.rdatatype.AAAA):
                answer = await _query(api, sandbox_id, dns.message.make_query(host, kind))
                for records in answer.answer:
                    if records.rdtype == kind and len(records):
                        return str(records[0])
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError, dns.exception.DNSException) as error:
        raise LookupError(f"cannot look up {host}: {error}") from error
    raise LookupError(f"{host} has no address, or the sandbox may not reach it")


async def _query(api: Api, sandbox_id: str, query: dns.message.Message) -> dns.message.Message:
    """Send a query over TCP (RFC 7766) and return the response.

    :raises dns.exception.DNSException: the response is cut off, malformed, or belongs to another query.
    """
    stream = await GuestStream.dial(api, sandbox_id, _RESOLVER, _PORT)
    try:
        wire = query.to_wire()
        await stream.write(len(wire).to_bytes(2, "big") + wire)
        data = b""
        while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
            more = await stream.read()
            if not more:
                raise dns.exception.FormError  # the resolver closed the connection
            data += more
        answer = dns.message.from_wire(data[2 : 2 + int.from_bytes(data[:2], "big")])
        if not query.is_response(answer):
            raise dns.exception.FormError  # the response belongs to another query
        return answer
    finally:
        stream.close()
