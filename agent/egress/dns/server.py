"""DNS server of a sandbox. It only looks up names that the policy allows, since a lookup is traffic to the outside.

Answers are pinned (`agent.egress.dns_pins`): afterwards, the names may be connected to only at these addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence

import dns.message
import dns.rcode
import dns.rdatatype

from agent.common.accepting import Acceptor
from agent.common.aio import TaskSet
from agent.common.policy.reasons import Reason
from agent.egress.dns import dns_answers
from agent.egress.dns.dns_answers import MalformedMessage, Question
from agent.egress.dns.resolver import BlockedAnswer, ResolveError, Resolver
from agent.egress.sandbox_state import SandboxState
from agent.egress.stderr_log import log_accept_failure

_MAX_IN_FLIGHT = 256  # queries per sandbox; more are dropped, and clients retry
_MAX_CONNECTIONS = 32
_IDLE_S = 10.0
_READ_AT_ONCE = 32
_MAX_TTL_S = 300.0  # so that a changed policy takes effect on names, too
_MAX_DATAGRAM = 4096


class DnsServer:
    """Server on the UDP and TCP sockets of one sandbox."""

    def __init__(self, sandbox: SandboxState, resolver: Resolver) -> None:
        self._sandbox = sandbox
        self._resolver = resolver
        self._udp: list[socket.socket] = []
        self._listeners: list[socket.socket] = []
        self._acceptors: list[Acceptor] = []
        self._tasks = TaskSet()
        self._connections = 0
        self._loop = asyncio.get_running_loop()

    def start(self, udp: Sequence[socket.socket], tcp: Sequence[socket.socket]) -> None:
        """Serve these sockets, which the server owns and closes."""
        self._udp, self._listeners = list(udp), list(tcp)
        for sock in self._udp:
            self._loop.add_reader(sock.fileno(), self._read, sock)
        self._acceptors = [Acceptor(sock, self._accepted, log_accept_failure) for sock in self._listeners]

    async def aclose(self) -> None:
        """Close the sockets and cancel all queries."""
        for acceptor in self._acceptors:
            acceptor.close()
        for sock in self._udp:
            self._loop.remove_reader(sock.fileno())
        for sock in (*self._udp, *self._listeners):
            sock.close()
        await self._tasks.cancel()

    def _read(self, sock: socket.socket) -> None:
        for _ in range(_READ_AT_ONCE):
            try:
                data, sender = sock.recvfrom(_MAX_DATAGRAM)
            except OSError:  # BlockingIOError: no more datagrams
                return
            if len(self._tasks) < _MAX_IN_FLIGHT:
                self._tasks.spawn(self._answer_datagram(sock, data, sender))

    async def _answer_datagram(self, sock: socket.socket, data: bytes, sender: tuple[str, int]) -> None:
        answer = await self._answer(data, udp=True)
        if answer is not None:
            with contextlib.suppress(OSError):
                sock.sendto(answer, sender)

    def _accepted(self, sock: socket.socket) -> None:
        if self._connections >= _MAX_CONNECTIONS:
            sock.close()
            self._sandbox.deny(Reason.TOO_MANY_CONNECTIONS, "", 53, "dns")
            return
        self._connections += 1
        self._tasks.spawn(self._serve(sock))

    async def _serve(self, sock: socket.socket) -> None:
        """Answer length-prefixed questions over TCP one by one (RFC 7766)."""
        writer = None
        try:
            reader, writer = await asyncio.open_connection(sock=sock)
            while True:
                async with asyncio.timeout(_IDLE_S):
                    size = int.from_bytes(await reader.readexactly(2), "big")
                    data = await reader.readexactly(size)
                answer = await self._answer(data, udp=False)
                if answer is None:
                    return
                writer.write(len(answer).to_bytes(2, "big") + answer)
                async with asyncio.timeout(_IDLE_S):
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            return
        finally:
            self._connections -= 1
            if writer is not None:
                writer.close()
            else:
                sock.close()

    # -- answering -----------------------------------------------------------------------------------------------------

    async def _answer(self, data: bytes, *, udp: bool) -> bytes | None:
        try:
            question = dns_answers.parse(data)
        except MalformedMessage as error:
            self._sandbox.deny(Reason.DNS_MALFORMED, "", 53, "dns")
            return error.answer
        return dns_answers.to_wire(question, await self._decide(question), udp=udp)

    async def _decide(self, question: Question) -> dns.message.Message:
        name = question.name
        if name is None or not self._sandbox.policy.looks_up(name):
            self._sandbox.deny(Reason.DNS_NOT_ALLOWED, question.text, 53, "dns")
            return dns_answers.refuse(question, "this name is not on the sandbox's allow list")
        if question.kind not in dns_answers.LOOKED_UP:
            return dns_answers.empty(question)
        try:
            return await self._look_up(question, name)
        except BlockedAnswer:
            self._sandbox.deny(Reason.DNS_BLOCKED_ANSWER, name, 53, "dns")
            return dns_answers.refuse(question, "this name has only addresses that sandboxes may not reach")
        except ResolveError as error:
            codes = {"nxdomain": dns.rcode.NXDOMAIN, "nodata": dns.rcode.NOERROR}
            return dns_answers.empty(question, codes.get(error.reason, dns.rcode.SERVFAIL))

    async def _look_up(self, question: Question, name: str) -> dns.message.Message:
        if question.kind in dns_answers.ADDRESS_TYPES:
            answer = await self._resolver.addresses_of_type(name, question.kind, self._sandbox.policy)
            self._sandbox.pins.pin(name, answer.addresses, answer.ttl_s)
            texts = [str(address) for address in answer.addresses]
            return dns_answers.with_addresses(question, texts, min(answer.ttl_s, _MAX_TTL_S))
        records, ttl_s = await self._resolver.query(name, question.kind)
        return dns_answers.with_records(question, records, min(ttl_s, _MAX_TTL_S))
